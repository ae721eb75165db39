"""torch's CUDA operators as far as they can be checked without CUDA: arguments, shapes, arithmetic around them."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_kernels import BANDS, assert_same, block, both_passes
from torch._subclasses.fake_tensor import FakeTensorMode

from ringattn.kernels import Operands, Options, Rows, aten, get, sdpa
from ringattn.kernels import operator_choice as choice
from ringattn.kernels.operator_choice import Facts
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = Facts((9, 0), 91900, (2, 11), (13, 0))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fake tensors on "cuda" are taken to be on a GPU with these facts."""

    def set_facts(**changes: object) -> None:
        monkeypatch.setattr(choice, "_read_gpu_facts", lambda device: HOPPER._replace(**changes))

    set_facts()
    return set_facts


# ---- arguments and shapes


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("bias_heads", [None, 3])
@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "efficient"])
def test_cuda_operators_take_these_arguments(kernel: str, dtype: torch.dtype, band: Band, bias_heads, on_hopper) -> None:
    """Names, order, shapes and dtypes only: fake tensors compute nothing."""
    if kernel == "sdpa":
        on_hopper(capability=(8, 0))
    with FakeTensorMode():
        q = torch.empty(2, 9, 37, 20, dtype=dtype, device="cuda")
        k = torch.empty(2, 3, 37, 20, dtype=dtype, device="cuda")
        bias = None if bias_heads is None else torch.empty(2, bias_heads, 37, device="cuda")
        rows = torch.empty(2, 9, 37, device="cuda")
        segment = [Segment(0, 37, 0, 37, band)]
        out, lse = get(kernel).forward(Operands(q, k, k, bias), segment, Options(0.3))
        grads = get(kernel).backward(Operands(q, k, k, bias), Rows(out.to(dtype), rows, rows), segment, Options(0.3))
        assert (out.shape, out.device, lse.shape, lse.dtype) == (q.shape, q.device, (2, 9, 37), torch.float32)
        assert [g.shape for g in grads[:3]] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
@pytest.mark.parametrize("keys", [37, 48])
def test_a_mask_has_the_memory_of_one_head(name: str, keys: int, on_hopper) -> None:
    with FakeTensorMode():
        q, k = (torch.empty(3, heads, keys, 16, dtype=BF16, device="cuda") for heads in (8, 4))
        mask = sdpa.additive_mask(keys, keys, Band(-3, 2), BF16, q.device)
        assert sdpa.additive_mask(keys, keys, Band(-3, 2), BF16, q.device) is mask
        for candidate in (mask, torch.empty(keys, keys, dtype=BF16, device="cuda")):
            call = aten.Call(q, k, k, candidate, False, 0.3)
            passed = (aten._shared if name == "cudnn" else aten._repeated)(call)[3]
            assert passed.shape == (3, 8 if name == "efficient" else 1, keys, keys)
            assert (
                passed.stride(0) == 0
                and (passed.shape[1] == 1 or passed.stride(1) == 0)
                and passed.stride(-1) == 1
                and passed.stride(-2) % 16 == 0
            )
            assert passed.untyped_storage().nbytes() <= keys * (keys + 15) * 2


# ---- arithmetic around the operators, behind functions with their signatures


def _flash(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
    assert dropout_p == 0.0 and return_debug_mask is False and q.shape[-1] % 8 == 0 and q.shape[1] == 3 * k.shape[1]
    out, lse = aten.cpu_forward(aten.Call(q, k, v, None, is_causal, scale))
    return out, lse, None, None, q.shape[2], k.shape[2], None, None, None


def _flash_backward(
    grad_out, q, k, v, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, *, scale
):
    assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
    assert logsumexp.is_contiguous()
    return aten.cpu_backward(aten.Call(q, k, v, None, is_causal, scale), grad_out, out, logsumexp)


def _efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, *, scale):
    assert compute_log_sumexp is True and dropout_p == 0.0 and q.shape[1] == k.shape[1] == v.shape[1] and q.shape[-1] % 8 == 0
    out, lse = aten.cpu_forward(aten.Call(q, k, v, attn_bias, is_causal, scale))
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)), None, None


def _efficient_backward(
    grad_out, q, k, v, attn_bias, out, logsumexp, seed, offset, dropout_p, grad_input_mask, is_causal, *, scale
):
    assert logsumexp.shape[-1] % 32 == 0 and grad_input_mask == [True, True, True, False]
    call = aten.Call(q, k, v, attn_bias, is_causal, scale)
    return (*aten.cpu_backward(call, grad_out, out, logsumexp[..., : q.shape[2]]), None)


class _Cudnn:
    """cuDNN's operator of some torch: lse of 3 or 4 dimensions; plans for backward are cached by the strides of q, k and v."""

    def __init__(self, dims: int, shares_heads: bool) -> None:
        self.dims, self.shares_heads, self.plans = dims, shares_heads, {}

    def forward(self, q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):
        assert return_debug_mask is False and compute_log_sumexp is True and q.shape[-1] % 8 == 0 and dropout_p == 0.0
        assert q.shape[1] == (3 if self.shares_heads else 1) * k.shape[1] or q.shape == k.shape == (1, 1, 64, 64)
        out, lse = aten.cpu_forward(aten.Call(q, k, v, attn_bias, is_causal, scale))
        lse = lse.contiguous()
        return out, lse.unsqueeze(-1) if self.dims == 4 else lse, None, None, q.shape[2], k.shape[2], None, None, None

    def backward(
        self, grad_out, q, k, v, out, lse, philox_seed, philox_offset, attn_bias, cum_q, cum_k, max_q, max_k, dropout_p,
        is_causal, *, scale,
    ):  # fmt: skip
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
        assert lse.is_contiguous() and lse.shape == (*q.shape[:3], 1)[: self.dims]
        key = (*((x.shape, x.stride()) for x in (q, k, v)), is_causal, attn_bias is None)
        assert self.plans.setdefault(key, (out.stride(), grad_out.stride())) == (out.stride(), grad_out.stride())
        return aten.cpu_backward(aten.Call(q, k, v, attn_bias, is_causal, scale), grad_out, out, lse.reshape(q.shape[:3]))


@pytest.fixture
def on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(name: str, *, dims: int = 4, shares_heads: bool = True) -> None:
        cudnn, real = _Cudnn(dims, shares_heads), torch.ops.aten
        operators = SimpleNamespace(
            _scaled_dot_product_flash_attention=_flash,
            _scaled_dot_product_flash_attention_backward=_flash_backward,
            _scaled_dot_product_efficient_attention=_efficient,
            _scaled_dot_product_efficient_attention_backward=_efficient_backward,
            _scaled_dot_product_cudnn_attention=cudnn.forward,
            _scaled_dot_product_cudnn_attention_backward=cudnn.backward,
            _scaled_dot_product_flash_attention_for_cpu=real._scaled_dot_product_flash_attention_for_cpu,
            _scaled_dot_product_flash_attention_for_cpu_backward=real._scaled_dot_product_flash_attention_for_cpu_backward,
        )
        monkeypatch.setattr(aten, "aten", operators)
        monkeypatch.setattr(aten, "CUDNN_SHARES_HEADS", shares_heads)
        monkeypatch.setattr(sdpa, "chosen", lambda kernel, device, shape: name)

    return install


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_arithmetic_around_the_cuda_operators(name: str, bias_heads, band: Band, on_stand_ins) -> None:
    """Padding, KV heads shared or repeated, bias channels."""
    if name == "flash" and band not in (FULL, CAUSAL):
        pytest.skip("flash is not chosen for bands")
    on_stand_ins(name)
    inputs = block(bias_heads=bias_heads, value_dim=12)
    for segments in ([Segment(0, 37, 0, 37, band)], [Segment(a, b, a, b, band) for a, b in ((0, 11), (11, 37))]):
        assert_same(both_passes("sdpa", inputs, segments), both_passes("reference", inputs, segments))


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("shares_heads", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_cudnn_of_every_torch(dims: int, shares_heads: bool, rows: int, on_stand_ins) -> None:
    """lse with and without a last dimension of 1, also of one row; fewer KV heads as they are or repeated."""
    on_stand_ins("cudnn", dims=dims, shares_heads=shares_heads)
    q, k, v, bias = block(bias_heads=3)
    inputs, segments = (q[:, :, :rows], k, v, bias), [Segment(0, rows, 0, 37, FULL)]
    assert_same(both_passes("sdpa", inputs, segments), both_passes("reference", inputs, segments))


def test_cudnns_cached_plans_get_one_memory_order(on_stand_ins) -> None:
    """dout arrives as views of messages, of (batch, rows, heads, dim), of slices: the plan was made for one of them."""
    on_stand_ins("cudnn")
    q, k, v, _ = block()
    operands, segments, options = Operands(q, k, v, None), [Segment(0, 37, 0, 37, CAUSAL)], Options(0.3)
    full = get("reference").forward(operands, segments, options)
    dout = torch.randn(full.out.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    for order in (dout, dout.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([dout, dout], 1)[:, :9]):
        rows = Rows(order, full.lse, (order * full.out).sum(-1))
        expected = get("reference").backward(operands, rows, segments, options)
        assert_same(get("sdpa").backward(operands, rows, segments, options)[:3], expected[:3])
