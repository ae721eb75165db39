"""Pages say what is so: examples run and print what pages show, pictures are up to date, the site builds, paths exist."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from public import PUBLIC
from spawn import JITS, finish, start, torch_extensions, torchrun

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
BLOCK = re.compile(r"```python[^\n]*\n(.*?)```", re.DOTALL)
SPANS = ("ringattn/forward", "ringattn/step3/wait")  # in a profile
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.mark.slow
@pytest.mark.timeout(JITS + 10)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_the_example_runs_and_prints_what_its_page_shows(example: Path, tmp_path: Path) -> None:
    text = example.read_text()
    launch = re.search(r"torchrun --standalone --nproc-per-node (\d) (\S+)|python (\S+)", text)
    assert launch and (launch[2] or launch[3]) == f"docs/examples/{example.name}", "its head says how it is run"
    if launch[1]:
        limit = JITS if "deepspeed" in text else 100
        extensions = torch_extensions(tmp_path)
        real = example.stem == "readme"  # the others need no interpreters of their own, nor torchrun's agent
        code, out, err = torchrun(
            str(example), ranks=int(launch[1]), timeout=limit, fresh=real, TORCH_EXTENSIONS_DIR=extensions, PYTHONPATH=str(ROOT)
        )
    else:
        code, out, err = finish(start([str(example), str(tmp_path)], PYTHONPATH=str(ROOT)), timeout=120)
    assert code == 0, err
    displayed = DOCS / "examples" / "outputs" / f"{example.stem}.txt"
    if displayed.exists():
        printed = sorted(out.splitlines())
        for line in displayed.read_text().splitlines():
            assert any(_alike(line, other) for other in printed), f"{line!r} is not in\n{out}"


def _alike(line: str, other: str) -> bool:
    """Whether two lines differ in nothing but the last digits of numbers, which depend on the processor."""
    if NUMBER.sub("#", line) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=2e-3, abs=1e-6) for a, b in pairs)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}


def test_every_example_is_on_a_page_and_every_block_of_python_is_an_example() -> None:
    pages = "\n".join(page.read_text() for page in PAGES)
    for example in EXAMPLES:
        assert f"docs/examples/{example.name}" in pages
    for page in PAGES[1:]:
        for block in BLOCK.findall(page.read_text()):
            assert re.fullmatch(r'--8<-- "docs/examples/\S+\.py(:\w+)?"\n', block), f"{page.name}: make a file of\n{block}"


def test_the_block_in_the_readme_is_its_example_and_fits_on_one_screen() -> None:
    (block,) = BLOCK.findall((ROOT / "README.md").read_text())
    assert block == (DOCS / "examples" / "readme.py").read_text()
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    script = DOCS / "examples" / "draw_schedules.py"
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True, env=_environment())
    return folder


@pytest.mark.parametrize("name", ["ring", "token_ring", "mesh", "ulysses"])
def test_the_drawn_schedules_are_up_to_date(name: str, drawn: Path) -> None:
    actual, stored = (drawn / f"{name}.svg").read_text(), (DOCS / "images" / f"{name}.svg").read_text()
    assert actual == stored, "run python docs/examples/draw_schedules.py"


def test_the_picture_of_measured_times_is_up_to_date(tmp_path: Path) -> None:
    script, picture = "benchmarks/cells_picture.py", tmp_path / "picture.svg"
    command = [sys.executable, script, "benchmarks/results/claimed", picture]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=_environment())
    assert picture.read_text() == (DOCS / "images" / "against_others.svg").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, anchor, page, include or docstring fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(), timeout=120)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_with_all_links_right(site: Path) -> None:
    assert (site / "index.html").exists() and (site / "guides" / "training" / "index.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_lists_exactly_what_is_public(package: str, site: Path) -> None:
    page = "integrations" if ".integrations." in package else package.split(".")[1] if "." in package else "ringattn"
    identifiers = re.findall(r'<h3 id="([^"]+)"', (site / "api" / page / "index.html").read_text())
    # A function whose module has its name, such as ring.ring, is listed by its full path.
    inside = [name.removeprefix(f"{package}.").split(".") for name in identifiers if name.startswith(f"{package}.")]
    own = [parts for parts in inside if f"{package}.{parts[0]}" not in PUBLIC]
    listed = {parts[-1] for parts in own if len(parts) == 1 or (len(parts) == 2 and parts[0] == parts[1])}
    if package == "ringattn":
        assert "ringattn.runtime.init.init" in identifiers
        listed.add("init")
    assert listed == _names_of(package)


def _names_of(package: str) -> set[str]:
    """What `__all__` has, without importing packages that write it down: some need other libraries."""
    path = ROOT.joinpath(*package.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            with suppress(ValueError):
                return set(ast.literal_eval(statement.value))
    return set(importlib.import_module(package).__all__)


def test_every_public_package_is_in_the_index_of_the_reference() -> None:
    assert set(_inventory_of_index()) == {".".join(package.split(".")[:2]) for package in PUBLIC}


def _inventory_of_index() -> Iterator[str]:
    for line in (DOCS / "api" / "index.md").read_text().splitlines():
        if match := re.match(r"\| \[`(ringattn[\w.]*)`\]", line):
            yield match[1]


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.stem)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        assert (ROOT / target).exists(), f"{page.name} links {target}, which is not there"
        heads = re.findall(r"^#+ (.*)", (ROOT / target).read_text(), re.MULTILINE) if anchor else []
        actual = {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in actual, f"{page.name} links {target}#{anchor}, which is not there"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.stem)
def test_files_named_on_pages_exist(page: Path) -> None:
    """The log is left out: it tells of files as they were."""
    for name in re.findall(r"(?<![\w/.-])(?:benchmarks|tests|launch|docs|ringattn)/[\w./*-]*\w", page.read_text()):
        elsewhere = name in SPANS or "results/gpu/DATE-CARD" in name
        assert elsewhere or list(ROOT.glob(name)), f"{page.name} names {name}, which is not there"


def test_the_tree_in_the_readme_has_every_package() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for package in sorted(path.parent.name for path in (ROOT / "ringattn").glob("*/__init__.py")):
        assert re.search(rf"^ +{package}/", tree, re.MULTILINE), f"{package} is missing in README's tree"


def test_pre_commit_runs_the_versions_that_ci_runs() -> None:
    import tomllib

    import yaml

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {name for extra in extras.values() for name in extra if name.startswith("ruff==")}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {name for hook in hooks for name in hook.get("additional_dependencies", [])} == pinned
    assert [hook["entry"] for hook in hooks if hook["id"] == "mypy"] == ["python -m mypy"]
    assert hooks[-1]["language"] == "system"  # the version of the environment that the test extra has installed
