"""Which of torch's operators computes a call, and which calls raise: by facts about the GPU, without one."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ringattn.kernels import Operands, Options, aten, get, sdpa
from ringattn.kernels import operator_choice as choice
from ringattn.kernels.operator_choice import CallShape, Facts, call_width, operator, version
from ringattn.kernels.select import resolved, unsupported_reason
from ringattn.sequence.segments import FULL, Segment

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = Facts((9, 0), 91900, (2, 11), (13, 0))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fake tensors on "cuda" are taken to be on a GPU with these facts."""

    def set_facts(**changes: object) -> None:
        monkeypatch.setattr(choice, "_read_gpu_facts", lambda device: HOPPER._replace(**changes))

    set_facts()
    return set_facts


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "cudnn"),
        ({"capability": (10, 0)}, "cudnn"),
        ({"capability": (10, 3), "cuda": (12, 8)}, "cudnn"),
        ({"capability": (10, 7), "cuda": (12, 8)}, "flash"),
        ({"capability": (8, 0)}, "flash"),
        ({"capability": (8, 9)}, "flash"),
        ({"capability": (12, 0)}, "flash"),
        ({"capability": (7, 5)}, "reference"),  # no bf16
        ({"cudnn": 91500}, "flash"),  # wrong where keys are no multiple of 128
        ({"cudnn": 91501}, "cudnn"),
        ({"cudnn": 0}, "flash"),
        ({"torch": (2, 8)}, "flash"),
        ({"torch": (2, 9)}, "cudnn"),
        ({"cudnn_enabled": False}, "flash"),
        ({"deterministic": True}, "flash"),
        ({"deterministic": True, "flash_enabled": False}, "efficient"),
    ],
    ids=str,
)
def test_the_default_is_torchs_own_choice(changes: dict, chosen: str) -> None:
    """As `check_prefer_cudnn_attention` of torch has it, from 2.9 on."""
    assert operator("sdpa", CallShape(BF16, 128, 8192), HOPPER._replace(**changes)) == chosen


@pytest.mark.parametrize(
    ("shape", "sdpa_takes", "cudnn_takes", "flash_takes"),
    [
        (CallShape(BF16, 128, 8192, masked=True), "cudnn", "cudnn", "efficient"),
        (CallShape(F16, 64, 37), "cudnn", "cudnn", "flash"),
        (CallShape(BF16, 136, 8192), "flash", "flash", "flash"),
        (CallShape(BF16, 256, 8192), "flash", "flash", "flash"),
        (CallShape(BF16, 264, 8192), "efficient", "efficient", "efficient"),
        (CallShape(BF16, 256, 8192, masked=True), "efficient", "efficient", "efficient"),
        (CallShape(BF16, 64, 1), "flash", "flash", "flash"),
        (CallShape(BF16, 64, 8192, many=65536), "flash", "flash", "flash"),
        (CallShape(F32, 64, 8192), "efficient", "efficient", "efficient"),
        (CallShape(F64, 64, 8192), "reference", "reference", "reference"),
    ],
    ids=str,
)
def test_what_each_operator_takes(shape: CallShape, sdpa_takes: str, cudnn_takes: str, flash_takes: str) -> None:
    actual = [operator(kernel, shape, HOPPER) for kernel in ("sdpa", "cudnn", "flash", "efficient")]
    assert actual == [sdpa_takes, cudnn_takes, flash_takes, "reference" if shape.dtype == F64 else "efficient"]


def test_flash_of_consumer_gpus_has_no_backward_for_some_sizes() -> None:
    for capability in ((8, 6), (8, 9), (12, 0)):
        actual = [
            operator("sdpa", CallShape(F16, width, 99), HOPPER._replace(capability=capability)) for width in (192, 200, 232)
        ]
        assert actual == ["flash", "efficient", "flash"]


@pytest.mark.parametrize("value_dim", [8, 254, 255, 256, 257, 300])
@pytest.mark.parametrize("head_dim", [120, 126, 127, 128, 200, 247, 254, 255, 256, 257])
@pytest.mark.parametrize("bias", [False, True])
def test_no_operator_gets_a_wider_call_than_it_takes(head_dim: int, value_dim: int, bias: bool, monkeypatch, on_hopper) -> None:
    """The width is that of the call: with the channels of the bias, v if it is wider, and padding. By the calls themselves."""
    widths: dict[str, int] = {}

    def spy(name: str, fused: aten.Fused) -> aten.Fused:
        def forward(call: aten.Call):
            widths[name] = call.q.shape[-1] + -call.q.shape[-1] % 8
            return fused.forward(call)

        return aten.Fused(forward, fused.backward)

    monkeypatch.setattr(sdpa, "FUSED", {name: spy(name, fused) for name, fused in aten.FUSED.items()})
    for deterministic in (False, True):
        monkeypatch.setattr(choice, "strictly_deterministic", lambda deterministic=deterministic: deterministic)
        widths.clear()
        with FakeTensorMode():
            q, k = (torch.empty(1, 2, 5, head_dim, dtype=BF16, device="cuda") for _ in range(2))
            v = torch.empty(1, 2, 5, value_dim, dtype=BF16, device="cuda")
            operands = Operands(q, k, v, torch.empty(1, 2, 5, device="cuda") if bias else None)
            get("sdpa").forward(operands, [Segment(0, 5, 0, 5, FULL)], Options(0.3))
        ((name, width),) = widths.items()
        assert width == call_width(head_dim, value_dim, bias=bias)
        assert width <= {"cudnn": 128, "flash": 256}.get(name, width)
        assert name == resolved("sdpa", CUDA, BF16, head_dim, value_dim, 2, bias=bias)
        for kernel, most in (("flash2", 256), ("flash", 256), ("cudnn", 128)):
            reason = unsupported_reason(kernel, CUDA, BF16, head_dim, value_dim, bias=bias, generation=9)
            assert ("takes head sizes up to" in (reason or "")) is (width > most), reason


def test_a_pinned_operator_that_cannot_compute_a_call_raises(on_hopper, monkeypatch) -> None:
    assert unsupported_reason("cudnn", CUDA, BF16, 128) is None and unsupported_reason("flash", CUDA, BF16, 256) is None
    assert unsupported_reason("efficient", CUDA, F32, 300, bias=True) is None
    assert "efficient' takes bfloat16, float16 and float32, not float64; make" in str(
        unsupported_reason("efficient", CUDA, F64, 64)
    )
    assert "'flash' runs on CUDA and the tensors are on cpu" in str(unsupported_reason("flash", torch.device("cpu"), BF16, 64))
    on_hopper(capability=(8, 9))
    assert "'flash' does not take head size 208 in bfloat16" in str(unsupported_reason("flash", CUDA, BF16, 206, bias=True))
    on_hopper(cudnn=0)
    assert "'cudnn' does not take head size 64 in float16 with compute capability 9.0 and cuDNN 0" in str(
        unsupported_reason("cudnn", CUDA, F16, 64)
    )
    on_hopper()
    monkeypatch.setattr(choice, "strictly_deterministic", lambda: True)
    assert "'cudnn' has no deterministic backward" in str(unsupported_reason("cudnn", CUDA, BF16, 64))
    assert unsupported_reason("sdpa", CUDA, BF16, 64) is None and resolved("sdpa", CUDA, BF16, 64, 64, 1) == "flash"


def test_resolved_names_what_computes(on_hopper) -> None:
    def name(kernel: str, device: torch.device = CUDA, dtype: torch.dtype = BF16, **more: bool) -> str:
        return resolved(kernel, device, dtype, 128, 128, 32, **more)

    assert name("sdpa") == "cudnn" and name("sdpa", bias=True) == "flash" and name("sdpa", dtype=F64) == "reference"
    assert name("sdpa", bias=True, bands=True) == "efficient" and name("sdpa", softcap=True) == "reference"
    assert name("sdpa", torch.device("cpu")) == "cpu" and name("sdpa", torch.device("meta")) == "reference"
    assert name("flash") == "flash" and name("efficient") == "efficient" and name("reference") == "reference"
    assert name("flash3:sm_margin=8") == "flash3:sm_margin=8"
    assert name("flash2", softcap=True) == "flash2" and name("flash2", softcap=True, bias=True) == "reference"
    on_hopper(capability=(8, 0))
    assert name("sdpa") == "flash"


def test_versions_are_read() -> None:
    assert version("2.11.0+cu130") == (2, 11) and version("2.9.0a0+git1") == (2, 9) and version("13") == (13, 0)
