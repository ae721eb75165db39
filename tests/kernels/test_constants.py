"""A second call copies nothing from the host and does not wait for the device: checked on fake CUDA tensors."""

import sys
from functools import wraps
from typing import Any

import pytest
import torch
from standins import module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringattn.kernels import KERNELS, Operands, Options, Rows, flash, flex, get
from ringattn.kernels import device_constants as constants
from ringattn.kernels import operator_choice as choice
from ringattn.kernels.device_constants import cached_per_stream
from ringattn.nn import grads
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment


class Watch(TorchDispatchMode):
    """Lists operators that the host has to wait for: what reads a tensor's value, and what touches the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default or any(x.device.type == "cpu" for x in tensors):
            self.operators.append(str(func))
        return out


def host_waits(call: Any) -> tuple[list[str], list[str]]:
    """The operators that a first and a second call make the host wait for."""
    operators = []
    for _ in range(2):
        with Watch() as watch:
            call()
        operators.append(watch.operators)
    return operators[0], operators[1]


def inputs(dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> tuple[Operands, Rows]:
    q, dout = (torch.empty(2, 9, 37, 24, dtype=dtype, device="cuda") for _ in range(2))
    k, v = (torch.empty(2, 3, 37, 24, dtype=dtype, device="cuda") for _ in range(2))
    rows = torch.empty(2, 9, 37, device="cuda")
    return Operands(q, k, v, torch.empty(2, 3, 37, device="cuda") if bias else None), Rows(dout, rows, rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(-3, 2)], ids=str)
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_torchs_operators(kernel: str, band: Band, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_read_gpu_facts", lambda device: choice.Facts((9, 0), 91900, (2, 11), (13, 0)))
    segments = [Segment(0, 37, 0, 37, band)]

    def both() -> None:
        get(kernel).forward(block, segments, Options(0.3))
        get(kernel).backward(block, rows, segments, Options(0.3))

    with FakeTensorMode():
        block, rows = inputs(bias=bias)
        assert host_waits(both)[1] == []


class Silent(flash.Flash):
    """A flash-attn kernel that computes nothing; everything else is as in the others."""

    def __init__(self) -> None:
        pass

    def call_forward(self, call: flash.Call) -> tuple[torch.Tensor, torch.Tensor]:
        packed = call.lengths is not None
        rows = call.q.shape[:-1] if not packed else (call.q.shape[1], call.q.shape[0])
        return torch.empty_like(call.q), call.q.new_empty(rows, dtype=torch.float32)

    def call_backward(self, call: flash.Call, dout: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in call[:3])


@pytest.mark.parametrize("bias", [False, True])
def test_many_documents_in_one_call(bias: bool) -> None:
    kernel, bands = Silent(), [CAUSAL] * 3

    def both() -> None:  # on the segments directly: slices of fake tensors need CUDA
        kernel._run_forward([block] * 3, bands, Options(0.3))
        kernel._run_backward([block] * 3, [rows] * 3, bands, Options(0.3))

    with FakeTensorMode():
        block, rows = inputs(bias=bias)
        first, second = host_waits(both)
    assert len(first) > 0 and second == []


def test_blocks_of_a_band_for_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention.BlockMask, "from_kv_blocks", lambda *tensors, **_: tensors)  # it needs CUDA itself
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        first, second = host_waits(lambda: flex.block_mask(300, 400, Band(-3, 200), device))
    assert len(first) > 0 and second == []


def test_gradients_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every parameter has a gradient nothing waits; where some have none here, the whole bucket reads once."""
    with FakeTensorMode():
        like = torch.empty(3, device="cuda", requires_grad=True)
        assert host_waits(lambda: list(grads._flags([True, True, False], like))) == ([], [])
    real = [torch.zeros(n, requires_grad=True) for n in (3, 5, 7, 2)]
    real[0].grad, real[2].grad = torch.ones(3), torch.ones(7)
    assert torch.cat(list(grads._flags([True, True, False, True], real[0]))).tolist() == [1.0, 1.0, 0.0, 1.0]
    reads_of_lists: list[torch.Tensor] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (reads_of_lists.append(x), tolist(x))[1])

    def elsewhere(group: Any, flat: torch.Tensor, what: str) -> None:  # another rank has one for the last parameter
        flat[len(real) - 1] += len(flat) == 4 + 17
        flat[-2:] = 5.0

    monkeypatch.setattr(grads, "sum_over", elsewhere)
    with Reads() as reads:
        grads._reduce([real[0], real[2]], None)  # type: ignore[arg-type]
        assert not reads_of_lists
        grads._reduce(real, None)  # type: ignore[arg-type]
    assert len(reads_of_lists) == 1 and reads.count == 0  # a comparison of a tensor would be one read for each
    assert real[1].grad is None and real[3].grad is not None and real[3].grad.tolist() == [5.0, 5.0]


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_cache_is_bounded_and_never_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    @cached_per_stream(2)
    def zeros(size: int, device: torch.device) -> torch.Tensor:
        built.append(size)
        return torch.zeros(size, device=device)

    cpu = torch.device("cpu")
    first = zeros(1, cpu)
    assert zeros(1, cpu) is first and built == [1]
    zeros(2, cpu), zeros(3, cpu), zeros(2, cpu), zeros(1, cpu)
    assert built == [1, 2, 3, 1]
    with FakeTensorMode() as mode:
        fake = zeros(1, cpu)
        assert fake is not first and zeros(1, cpu) is fake
    with FakeTensorMode():
        assert zeros(1, cpu) is not fake
    assert zeros(1, cpu).device == cpu and type(zeros(1, cpu)) is torch.Tensor and mode is not None
    with torch.inference_mode():
        assert not zeros(4, cpu).is_inference()
    monkeypatch.setattr(constants, "_capturing", lambda device: True)
    in_capture = zeros(5, cpu)
    assert zeros(4, cpu) is zeros(4, cpu) and zeros(5, cpu) is not in_capture


def test_sm_margin_reaches_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []
    for generation in ("flash3", "flash3, later"):
        fake_module = module(generation)
        for name in ("_flash_attn_forward", "_flash_attn_backward"):
            real = getattr(fake_module, name)
            replaced = _recording(real, passed)
            monkeypatch.setattr(fake_module, name, replaced)
        monkeypatch.setitem(sys.modules, KERNELS["flash3"].package.module, fake_module)
        get.cache_clear()
        q, k, v, dout = torch.randn(4, 1, 2, 9, 8, dtype=torch.float64)
        block, segments, options = Operands(q, k, v, None), [Segment(0, 9, 0, 9, CAUSAL)], Options(0.3)
        for name, margin in (("flash3", None), ("flash3:sm_margin=8", 8)):
            passed.clear()
            out, lse = get(name).forward(block, segments, options)
            get(name).backward(block, Rows(dout, lse, (dout * out).sum(-1)), segments, options)
            assert passed == [margin, margin]
    get.cache_clear()


def _recording(real: Any, passed: list[Any]) -> Any:
    @wraps(real)
    def recording(*args: Any, **arguments: Any) -> Any:
        passed.append(arguments.get("sm_margin"))
        return real(*args, **arguments)

    return recording
