"""The architecture as tests: what may import what, what works without torch, and what the public may rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringattn

ROOT = Path(ringattn.__file__).parent

# Each may import itself and what stands before it. Nothing points up.
LAYERS = [
    ["errors"],
    ["arguments"],
    ["kernel_names"],
    ["mask"],
    ["layout"],
    ["by_documents"],
    ["pieces"],
    ["schedule"],
    ["topology", "payload"],
    ["lanes"],
    ["plan"],
    ["cost"],
    ["planner"],
    ["forecast"],
    ["partial", "comm", "kernels"],
    ["callers", "engine", "first_order", "joint_backward", "selective"],
    ["sharding"],
    ["shapes"],
    ["work"],
    ["autograd"],
    ["op"],
    ["functional", "measure"],
    ["compress"],
    ["nn", "runtime"],
    ["integrations"],
    ["selftest"],
    ["cli"],
]
PURE = [
    "errors",
    "arguments",
    "kernel_names",
    "mask",
    "layout",
    "by_documents",
    "pieces",
    "schedule",
    "topology",
    "payload",
    "lanes",
    "plan",
    "cost",
    "planner",
    "forecast",
]


def unit(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Names of top-level ringattn units and other packages that a module imports when it is imported."""
    tree = ast.parse(path.read_text())
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if node in lazy:
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module == "ringattn":
            names = [f"ringattn.{ringattn._HOME.get(a.name, a.name)}" for a in node.names]
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "ringattn" and len(parts) > 1 else parts[0])
    return found


MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_points_up(path: Path) -> None:
    order = {name: n for n, layer in enumerate(LAYERS) for name in layer}
    assert unit(path) in order, "a new unit needs its place in LAYERS"
    for name in imports(path) & set(order):
        assert order[name] <= order[unit(path)], f"{unit(path)} imports {name}, which stands above it"


def test_the_engine_knows_no_kernel_mask_or_planner() -> None:
    assert not imports(ROOT / "engine.py") & {"kernels", "mask", "layout", "pieces", "plan", "planner", "cost", "topology"}


def test_the_pure_layer_needs_no_torch() -> None:
    """In a fresh interpreter in which importing torch fails."""
    modules = ", ".join(f"ringattn.{name}" for name in PURE)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"import {modules}, ringattn.schedule.draw\n"
        "plan = ringattn.make_plan(100, world=4, heads=8, head_dim=64, mask=ringattn.causal())\n"
        "print(plan)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0 and "4 ranks" in ran.stdout, ran.stderr


def test_importing_ringattn_does_nothing() -> None:
    code = "import sys, ringattn; print([m for m in ('torch', 'numpy', 'ringattn.plan') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stdout.strip() == "[]"


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


def test_no_public_function_shares_a_name_with_a_module() -> None:
    assert not set(ringattn.__all__) & {unit(p) for p in MODULES}
