"""What users copy uses only what users may use: launch/, docs/, benchmarks/ and the main job import public names alone."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from public import PUBLIC

ROOT = Path(__file__).parent.parent
JOB = "ringattn.cli.train"  # its own modules may import each other
HISTORY = ROOT / "docs" / "log.md"  # tells of code as it was
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


@cache
def names_of(package: str) -> frozenset[str]:
    """What a public package offers: its `__all__`, and the public packages in it."""
    inside = {name.removeprefix(f"{package}.").partition(".")[0] for name in PUBLIC if name.startswith(f"{package}.")}
    return frozenset(import_module(package).__all__) | inside


def inner_uses(code: str) -> Iterator[str]:
    """Names of ringattn in `code` that are not public: imported, or reached by attributes of a package."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _of_ringattn(alias.name) and alias.name not in PUBLIC)
        elif isinstance(node, ast.ImportFrom) and _of_ringattn(node.module or ""):
            assert node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if _inner(node.module, a.name))
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("ringattn."):
            package = max((p for p in PUBLIC if name.startswith(f"{p}.")), key=len, default="")
            first = name.removeprefix(f"{package}.").partition(".")[0]
            if re.fullmatch(r"[\w.]+", name) and not first.startswith("__") and _inner(package, first):
                yield name


def _of_ringattn(module: str) -> bool:
    return module == "ringattn" or module.startswith("ringattn.")


def _inner(package: str, name: str) -> bool:
    return package not in PUBLIC or name not in names_of(package)


def offences(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix == ".py":
        codes, commands = [text], text
    else:
        fences = FENCE.findall(text) if path.suffix == ".md" else []
        codes, commands = [code for language, code in fences if language == "python"], text
    actual = [use for code in codes for use in inner_uses(code)]
    return sorted({*actual, *re.findall(r"-m ringattn\.[\w.]+", commands)})


def pages() -> list[Path]:
    folders = [p for name in ("launch", "docs", "benchmarks", "ringattn/cli/train") for p in (ROOT / name).rglob("*")]
    files = [p for p in [*folders, *ROOT.glob("*.md")] if p.suffix in (".py", ".md", ".sh", ".sbatch", ".yaml")]
    return [p for p in files if "results" not in p.parts and p != HISTORY]


@pytest.mark.parametrize("path", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_public_names(path: Path) -> None:
    actual = offences(path)
    if path.is_relative_to(ROOT / "ringattn"):
        actual = [use for use in actual if not use.startswith(f"{JOB}.")]
    assert not actual, (
        f"{path.relative_to(ROOT)} uses {', '.join(actual)}; import from a public package, or export the name there"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import ringattn.execution.engine",
        "from ringattn.planner.topology import PRESETS",
        "from ringattn.execution import engine",
        "from ringattn import _validation",
        "import ringattn\nringattn.kernels.lse.merge_(1, 2)",
        "import ringattn\nprint(ringattn.execution.engine)",
        "def late():\n    from ringattn.comm.p2p import P2P",
    ],
)
def test_inner_names_are_found(code: str) -> None:
    assert list(inner_uses(code))


def test_public_names_are_not() -> None:
    code = """
import ringattn, ringattn.planner
from ringattn import attention, schedule
from ringattn.schedule import draw, token_ring
from ringattn.planner import PRESETS, price
print(ringattn.__version__, ringattn.schedule.token_ring(4), ringattn.make_plan(8, world=2).digest)
"""
    assert not list(inner_uses(code))
    assert len(pages()) > 30


def test_every_public_name_is_there() -> None:
    """`__all__` names what the package has."""
    for package in PUBLIC:
        module = import_module(package)
        assert not [name for name in module.__all__ if not hasattr(module, name)], package
