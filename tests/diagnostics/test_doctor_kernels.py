"""What stands in a kernel's way, which is picked, and what doctor and selftest say of it."""

import re
import subprocess
import sys
from inspect import signature
from types import ModuleType

import pytest
import torch
from spawn import torchrun
from standins import module

from ringattn import make_plan
from ringattn.diagnostics import doctor, selftest
from ringattn.diagnostics.selftest import report
from ringattn.errors import InputError, PlanError
from ringattn.kernels import KERNELS, get
from ringattn.kernels import operator_choice as choice
from ringattn.kernels import select as pick
from ringattn.kernels.operator_choice import Facts
from ringattn.kernels.ranking import rank
from ringattn.kernels.reference import Reference
from ringattn.kernels.select import unsupported_reason

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Puts stand-ins where the named packages would be, and nothing where the others would; on a GPU of some generation."""

    def install(*names: str, generation: int = 9) -> None:
        for name in ("flash2", "flash3", "flash4"):
            there: ModuleType | None = module(name) if name in names else None
            monkeypatch.setitem(sys.modules, KERNELS[name].package.module, there)
        monkeypatch.setattr(choice, "_read_gpu_facts", lambda device: Facts((generation, 0), 91900, (2, 11), (13, 0)))
        monkeypatch.setattr(pick, "get", lambda name: KERNELS[name]() if name in KERNELS else None)

    return install


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "bias", "generation", "message"),
    [
        ("flash2", CPU, BF16, 64, False, 9, "runs on CUDA and the tensors are on cpu; make the plan with kernel='sdpa'"),
        ("cudnn", CPU, BF16, 64, False, 9, "runs on CUDA"),
        ("flash2", CUDA, torch.float32, 64, False, 9, "takes bfloat16 and float16, not float32"),
        ("flash2", CUDA, BF16, 264, False, 9, "head sizes up to 256, and there are 264"),
        ("flash2", CUDA, BF16, 256, True, 9, "up to 256, and there are 256 and 2 for the bias"),
        ("flash3", CUDA, BF16, 64, False, 8, "compute capability 9 to 9, and this is 8"),
        ("flash2", CUDA, BF16, 64, False, 10, "compute capability 8 to 9, and this is 10"),
        ("flash4", CUDA, BF16, 160, False, 10, "up to 128 on this GPU, 192 with 128, or 256"),
        ("flash4", CUDA, BF16, 256, False, 10, None),
        ("flash4", CUDA, BF16, 160, False, 9, None),
        ("flash2", CUDA, torch.float16, 64, True, 8, None),
        ("flex", CUDA, torch.float64, 64, False, 9, "no float64"),
        ("flex", CPU, torch.float64, 64, True, 9, None),
        ("sdpa", CPU, torch.float64, 999, True, 9, None),
        ("emulated:1e9", CPU, BF16, 64, False, 9, None),
    ],
)
def test_what_stands_in_the_way(name, device, dtype, head_dim, bias, generation, message, installed) -> None:
    installed("flash2", "flash3", "flash4", generation=generation)
    actual = unsupported_reason(name, device, dtype, head_dim, bias=bias)
    assert actual is None if message is None else message in actual, actual


def test_an_absent_package_stands_in_the_way(installed) -> None:
    installed()
    assert "kernel 'flash2': flash-attn 2 is not installed" in unsupported_reason("flash2", CUDA, BF16, 64)


@pytest.mark.parametrize(
    ("there", "generation", "asked", "picked"),
    [
        (("flash2", "flash3", "flash4"), 9, {}, "flash3"),
        (("flash2", "flash4"), 9, {}, "flash4"),
        (("flash2", "flash3", "flash4"), 10, {}, "flash4"),
        (("flash2", "flash3", "flash4"), 8, {}, "flash2"),
        (("flash2",), 8, {"softcap": True}, "flash2"),
        (("flash2",), 8, {"softcap": True, "bias": True}, "flex"),
        ((), 9, {"softcap": True}, "flex"),
        ((), 9, {}, "sdpa"),
    ],
)
def test_what_is_picked(there, generation, asked, picked, installed) -> None:
    installed(*there, generation=generation)
    name, why = pick.pick("cuda", BF16, 128, **asked)
    assert name == picked and why
    assert pick.pick("cuda", torch.float64, 128).name == "sdpa" == pick.pick("cpu", BF16, 128, **asked).name


def test_doctor_has_a_line_for_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device", lambda: CPU)
    actual = {finding.what: finding for finding in doctor.examine()}
    assert "runs, within" in actual["flex kernel"].outcome
    for name in ("cudnn", "flash2", "flash3", "flash4"):
        assert "runs on CUDA and the tensors are on cpu" in actual[f"{name} kernel"].outcome
        assert not actual[f"{name} kernel"].hint
    assert actual["kernel='auto'"].outcome == "means sdpa on every rank and machine"
    assert actual["default on cpu, bfloat16"].outcome == "cpu"
    monkeypatch.setattr(doctor, "pick", lambda *_: pick.Pick("flash3", "it is there"))
    assert "; try kernel='flash3' (it is there)" in next(iter(doctor._auto())).outcome
    hopper = Facts((9, 0), 91900, (2, 11), (13, 0))
    monkeypatch.setattr(choice, "_read_gpu_facts", lambda device: hopper)
    monkeypatch.setattr(doctor, "_devices_to_examine", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(doctor, "_torchs_own", lambda device, dtype, dim: "efficient" if dtype == torch.float32 else "cudnn")
    message = {finding.what: finding.outcome for finding in doctor._auto()}
    assert (
        message["default on cuda:0, bfloat16"]
        == "cudnn for 64 and 128, flash (efficient for bands, torch itself: cudnn) for 256"
    )
    assert message["default on cuda:0, float32"] == "efficient"


def test_what_torch_itself_takes_is_asked_of_torch() -> None:
    """On the CPU its flash operator, for want of a GPU; the answer is a name of `choice`, or what went wrong."""
    assert doctor._torchs_own(CPU, torch.float32, 64) == "flash"
    assert doctor._torchs_own(torch.device("cuda", 0), BF16, 64).startswith("unknown, ") or torch.cuda.is_available()


def test_kernels_are_ranked_by_measurement() -> None:
    """Interleaved, the fastest first; what cannot run is told why, and an unknown name is refused."""
    given = dict(heads=4, kv_heads=2, head_dim=16, rows=64)
    actual = rank("cpu", torch.float32, kernels=("reference", "sdpa", "flash3", "flex"), repeats=2, **given)
    assert {timing.kernel for timing in actual} == {"reference", "sdpa", "flash3", "flex"}
    ran, last = actual[:-1], actual[-1]
    assert [t.seconds for t in ran] == sorted(t.seconds for t in ran) and all(0 < t.seconds < 60 for t in ran)
    assert (last.kernel, last.seconds) == ("flash3", float("inf")) and "runs on CUDA" in last.failed and "runs" in str(last)
    assert {t.kernel: t.operator for t in ran} == {"reference": "reference", "sdpa": "cpu", "flex": "flex"}
    with pytest.raises(InputError, match="kernel='flsh'; choose one of auto, sdpa"):
        rank("cpu", torch.float32, kernels=("flsh",), **given)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash3:sm_margin", "give sm_margin as a whole number"),
        ("flash3:sm_margin=-1", "give sm_margin as a whole number: sm_margin=N \\(multiprocessors to leave"),
        ("flash3:sm_margin=99999999999", "give sm_margin as a whole number"),
        ("flash3:sm=8", "options of 'flash3' are sm_margin=N .*, not 'sm'"),
        ("flash3:sm_margin=8,sm_margin=9", "an option occurs twice"),
        ("flash3:", "options of 'flash3' are sm_margin=N"),
        ("flash2:sm_margin=8", "'flash2' has no options .only flash3 has.: pass kernel='flash2'"),
        ("nothing:sm_margin=8", "choose one of auto, sdpa"),
    ],
)
def test_options_that_a_kernel_does_not_have_are_refused(name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(64, world=2, heads=4, head_dim=8, dtype=BF16, kernel=name)
    with pytest.raises(InputError, match=message):
        get(name)


def test_options_are_part_of_the_plan() -> None:
    def plan(kernel: str):
        return make_plan(64, world=2, heads=4, head_dim=8, dtype=BF16, kernel=kernel)

    assert plan("flash3:sm_margin=8").kernel == "flash3:sm_margin=8" != plan("flash3").kernel
    assert plan("flash3:sm_margin=8").digest != plan("flash3").digest
    assert plan("flash3:sm_margin=0").digest == plan("flash3").digest


def test_an_installed_flash_attn_3_without_sm_margin_is_told(installed, monkeypatch) -> None:
    installed("flash3")
    old = sys.modules[KERNELS["flash3"].package.module]
    forward = old._flash_attn_forward
    names = [name for name in signature(forward).parameters if name != "sm_margin"]
    scope: dict = {}
    exec(f"def without({', '.join(names)}): pass", scope)
    monkeypatch.setattr(old, "_flash_attn_forward", scope["without"])
    assert KERNELS["flash3"]() is not None
    with pytest.raises(InputError, match="_flash_attn_forward of the installed flash-attn 3 does not take sm_margin"):
        KERNELS["flash3"](sm_margin=8)


def test_importing_kernels_imports_no_package() -> None:
    code = (
        "import sys, ringattn.kernels.select, ringattn.execution.attention; print([m for m in sys.modules if 'flash_a' in m])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() == "[]"


# ---- selftest


SMALL = "['sdpa'], device='cpu', worlds=[2], schedules=['token_ring']"
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'docstring_parser', 'typeguard']))"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_selftest_simulates_ranks_with_nothing_but_torch() -> None:
    code = f"{WITHOUT}; from ringattn.diagnostics import selftest; sys.exit(not selftest.run({SMALL}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "all passed" in done.stdout, done.stdout + done.stderr
    for name in ("alone", "token_ring 2", *(trap.name for trap in selftest.traps()), "equal bits twice in deterministic mode"):
        assert re.search(rf"^{name}  +pass \S+ +pass \S+$", done.stdout, re.MULTILINE), name + done.stdout


def test_selftest_sees_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in rows with many hidden keys, a scale off by a thousandth, bits that differ: each is a failure by name."""

    def outcome(**changes: object) -> float:
        errors = selftest.simulated_error(trap, "reference", "ring", 2, device=CPU, dtype=torch.float32)
        assert errors is not None and set(errors) == {"out", "dq", "dk", "dv", "dbias"}
        return max(errors.values())

    trap = selftest.traps()[0]._replace(length=40, hidden=30)
    assert outcome() < 1e-5
    real = Reference.segment_forward
    monkeypatch.setattr(
        Reference, "segment_forward", lambda self, b, band, o: real(self, b, band, o._replace(scale=o.scale * 1.001))
    )
    assert outcome() > 1e-5
    monkeypatch.setattr(
        Reference, "segment_forward", lambda self, b, band, o: real(self, b._replace(q=b.q * torch.nan), band, o)
    )
    assert outcome() == float("inf")
    noise = iter(range(1, 99))
    monkeypatch.setattr(
        Reference, "segment_forward", lambda self, b, band, o: real(self, b._replace(q=b.q * (1 + next(noise) * 1e-6)), band, o)
    )
    assert not selftest.equal_bits(trap, "reference", "ring", 2, device=CPU, dtype=torch.float32)
    assert not torch.are_deterministic_algorithms_enabled()


def test_selftest_tells_what_cannot_run_and_leaves_flex_for_last() -> None:
    (raised,) = selftest.simulated(["flash2"], device=CPU, dtypes=[BF16])
    assert not raised.passed and "kernel 'flash2' runs on CUDA" in raised.failures[0]
    assert "FAIL flash2, bfloat16, alone 1: kernel 'flash2' runs on CUDA" in report.as_table([raised], "title")
    assert selftest.kernels_here(CPU, BF16) == ["sdpa", "reference", "flex"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_selftest_over_ranks() -> None:
    code, out, err = torchrun("-m", "ringattn", "selftest", "--kernel", "sdpa", ranks=2, timeout=240)
    assert code == 0 and "all passed" in out and out.count("pass ") == 14, out + err
