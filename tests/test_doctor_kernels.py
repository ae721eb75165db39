"""What stands in a kernel's way, which is picked, and what doctor and selftest say of it."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from spawn import torchrun
from standins import module

from ringattn.kernels import KERNELS, pick
from ringattn.kernels.pick import obstacle
from ringattn.runtime import doctor

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Puts stand-ins where the named packages would be, and nothing where the others would; on a GPU of some generation."""

    def install(*names: str, generation: int = 9) -> None:
        for name in ("flash2", "flash3", "flash4"):
            there: ModuleType | None = module(name) if name in names else None
            monkeypatch.setitem(sys.modules, KERNELS[name].package.module, there)
        monkeypatch.setattr(pick, "_generation", lambda device: generation)
        monkeypatch.setattr(pick, "get", lambda name: KERNELS[name]())

    return install


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "bias", "generation", "said"),
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
def test_what_stands_in_the_way(name, device, dtype, head_dim, bias, generation, said, installed) -> None:
    installed("flash2", "flash3", "flash4", generation=generation)
    found = obstacle(name, device, dtype, head_dim, bias=bias)
    assert found is None if said is None else said in found, found


def test_an_absent_package_stands_in_the_way(installed) -> None:
    installed()
    assert "kernel 'flash2': flash-attn 2 is not installed" in obstacle("flash2", CUDA, BF16, 64)


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
    found = {finding.what: finding for finding in doctor.examine()}
    assert "runs, within" in found["flex kernel"].found
    for name in ("cudnn", "flash2", "flash3", "flash4"):
        assert "runs on CUDA and the tensors are on cpu" in found[f"{name} kernel"].found
        assert not found[f"{name} kernel"].cure
    assert found["kernel='auto'"].found == "means sdpa on every rank and machine"
    monkeypatch.setattr(doctor, "pick", lambda *_: pick.Pick("flash3", "it is there"))
    assert doctor._auto().found.endswith("; try kernel='flash3' (it is there)")


def test_importing_kernels_imports_no_package() -> None:
    code = "import sys, ringattn.kernels.pick, ringattn.functional; print([m for m in sys.modules if 'flash_a' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50).stdout.strip() == "[]"


@pytest.mark.timeout(300)
def test_selftest_passes_here_and_fails_for_what_cannot_run() -> None:
    code, out, err = torchrun("-m", "ringattn.selftest", "--kernel", "sdpa", ranks=2, timeout=240)
    assert code == 0 and "all passed" in out and out.count("pass ") == 14, out + err
    code, out, err = torchrun("-m", "ringattn.selftest", "--kernel", "flash2", ranks=1, timeout=120)
    assert code == 1 and "FAIL flash2, bfloat16: kernel 'flash2' runs on CUDA" in out, out + err
