"""The architecture as tests: which file may import which, what works without torch, and what the public may rely on."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ringattn

ROOT = Path(ringattn.__file__).parent

# From the bottom up: a file may import what stands in its own line or before it. The longest name that fits a file is its
# place, so a single file may stand elsewhere than its package.
ORDER = [
    "errors",
    "_validation",
    "sequence",
    "schedule",
    "plan",
    "planner.topology",
    "planner.cost",
    "planner.closed_form",
    "planner.solver",
    "planner",
    "kernels",
    "comm.process_group",
    "faults",
    "comm",
    "execution",
    "merging",
    "nn",
    "runtime",
    "checkpoint",
    "integrations.transformers",
    "integrations",
    "diagnostics",
    "cli",
    "__main__",
]
PURE = ["errors", "_validation", "sequence", "schedule", "schedule.draw", "plan", "planner"]
LOOSE = {"__init__", "__main__", "errors", "_validation"}


def module_of(path: Path) -> str:
    """`kernels.flash2` for ringattn/kernels/flash2.py, `kernels` for ringattn/kernels/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}


def place(module: str) -> int:
    """The line of `ORDER` that a file stands in."""
    fits = [unit for unit in ORDER if module == unit or module.startswith(f"{unit}.")]
    assert fits, f"ringattn/{module.replace('.', '/')} needs a place in ORDER"
    return ORDER.index(max(fits, key=len))


def imports(source: str, *, lazy: bool) -> Iterator[str]:
    """Files of ringattn that a module imports, as in `FILES`; with `lazy` those too that its functions import when called."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for_types = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {n for part in [*for_types, *(functions if not lazy else [])] for n in ast.walk(part)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("ringattn.") for a in node.names if a.name.startswith("ringattn."))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here, so that each says what it takes"
            package, _, module = (node.module or "").partition(".")
            if package != "ringattn":
                continue
            for alias in node.names:
                exported = ringattn._HOME.get(alias.name, alias.name) if not module else f"{module}.{alias.name}"
                yield exported if exported in FILES else module


def upward(module: str, source: str) -> list[str]:
    """Imports of `module` that point up."""
    return [actual for actual in imports(source, lazy=True) if actual and place(actual) > place(module)]


@pytest.mark.parametrize("module", FILES)
def test_nothing_points_up(module: str) -> None:
    assert not upward(module, FILES[module].read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels.sdpa", "from ringattn.comm.p2p import P2P"),
        ("planner.cost.flows", "from ringattn.planner.request import request"),
        ("faults.diagnosis", "from ringattn.comm import p2p"),
        ("execution.engine", "import ringattn.merging.matching"),
        ("schedule.ring", "def ring():\n    from ringattn import make_plan"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, line: str) -> None:
    assert upward(module, f"{FILES[module].read_text()}\n{line}\n")


def test_no_files_import_each_other() -> None:
    """A cycle works or not by which file is imported first."""
    graph = {module: set(imports(path.read_text(), lazy=False)) - {module} for module, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_the_engine_knows_no_kernel_mask_or_planner() -> None:
    actual = {name.partition(".")[0] for name in imports(FILES["execution.engine"].read_text(), lazy=True)}
    assert actual <= {"comm", "schedule", "errors"}
    everything = {
        name
        for module, path in FILES.items()
        if module.startswith("execution.")
        for name in imports(path.read_text(), lazy=True)
    }
    assert not {name for name in everything if name.startswith("planner")}


def test_few_modules_stand_beside_the_packages() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= LOOSE


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 400


def test_the_pure_layer_needs_no_torch() -> None:
    """In a fresh interpreter in which importing torch fails."""
    modules = ", ".join(f"ringattn.{name}" for name in PURE)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"import {modules}\n"
        "plan = ringattn.make_plan(100, world=4, heads=8, head_dim=64, mask=ringattn.causal())\n"
        "print(plan)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "4 ranks" in ran.stdout, ran.stderr


def test_importing_ringattn_does_nothing() -> None:
    code = "import sys, ringattn; print([m for m in ('torch', 'numpy', 'ringattn.plan') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() == "[]"


def test_the_public_surface_is_a_constant() -> None:
    """Others call this. It changes by adding, with a line in CHANGELOG.md."""
    assert ringattn.__all__ == [
        "CheckpointError",
        "CommError",
        "InputError",
        "LaunchError",
        "Layout",
        "Mask",
        "MismatchError",
        "Plan",
        "PlanError",
        "RingAttnError",
        "Schedule",
        "ScheduleError",
        "StalledError",
        "Topology",
        "attention",
        "causal",
        "documents",
        "full",
        "init",
        "load_topology",
        "make_plan",
        "positions",
        "prefix_lm",
        "shard",
        "sliding_window",
        "unshard",
    ]
    for name in ringattn.__all__:
        assert getattr(ringattn, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        _ = ringattn.atention


PACKAGES = sorted({path.parent for path in FILES.values() if path.name == "__init__.py"})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: module_of(path / "__init__.py"))
def test_a_package_has_what_it_lists(package: Path) -> None:
    name = f"ringattn.{module_of(package / '__init__.py')}"
    if name.startswith("ringattn.integrations"):
        pytest.importorskip("transformers")
    module = __import__(name, fromlist=["__all__"])
    for public in getattr(module, "__all__", []):
        assert getattr(module, public) is not None


def test_no_public_function_shares_a_name_with_a_package() -> None:
    assert not set(ringattn.__all__) & {module.partition(".")[0] for module in FILES}
