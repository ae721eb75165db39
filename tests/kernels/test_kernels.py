"""Kernels against plain mathematics, and merging of partials. The CUDA operators are in test_cuda_operators."""

import pytest
import torch

from ringattn.kernels import Kernel, Operands, Options, Rows, get, sdpa
from ringattn.kernels.fused import surrogate_out
from ringattn.kernels.lse import Partial, empty_partial, merge_
from ringattn.sequence.mask import END
from ringattn.sequence.segments import CAUSAL, FULL, Band, Segment

BANDS = [FULL, CAUSAL, Band(-3, 2), Band(-3, END), Band(0, 0)]
ON_CPU = ["flex", "reference", "sdpa"]  # those of the flash-attn packages are in test_flash
F64 = torch.float64
PLAIN = Options(0.3)


def block(dim: int = 8, *, rows: int = 37, bias_heads: int | None = None, value_dim: int | None = None, dtype=F64):
    source = torch.Generator().manual_seed(rows)
    shapes = [(2, 9, rows, dim), (2, 3, rows, dim), (2, 3, rows, value_dim or dim)]
    q, k, v = (torch.randn(s, generator=source, dtype=F64).to(dtype) for s in shapes)
    bias = None if bias_heads is None else torch.randn(2, bias_heads, rows, generator=source, dtype=F64)
    if bias is not None:
        bias[0, 0, :5] = -torch.inf
    return q, k, v, bias


def both_passes(kernel: str | Kernel, inputs, segments, options=PLAIN):
    """(out, lse, dq, dk, dv, dbias) with row statistics from the plain mathematics."""
    kernel = get(kernel) if isinstance(kernel, str) else kernel
    q, k, v, bias = inputs
    out, lse = kernel.forward(Operands(q, k, v, bias), segments, options)
    reference = get("reference").forward(Operands(q, k, v, bias), segments, options)
    dout = torch.cos(torch.arange(reference.out.numel(), dtype=F64)).reshape(reference.out.shape).to(q.dtype)
    delta = (dout * reference.out).sum(-1)
    rows = Rows(dout, reference.lse.masked_fill(reference.lse == -torch.inf, torch.inf), delta)
    grads = kernel.backward(Operands(q, k, v, bias), rows, segments, options)
    return [x for x in (out, lse, *grads) if x is not None]


def assert_same(actual, expected, tolerance=1e-13) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b[b.isfinite()].abs().max().item()))


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("value_dim", [8, 5, 12])
def test_sdpa_is_the_reference(band: Band, bias_heads: int | None, value_dim: int) -> None:
    inputs = block(bias_heads=bias_heads, value_dim=value_dim)
    segments = [Segment(0, 37, 0, 37, band)]
    assert_same(both_passes("sdpa", inputs, segments), both_passes("reference", inputs, segments))


@pytest.mark.parametrize("scale", [0.4, -0.4])
def test_the_reference_is_autograd_of_softmax(scale: float) -> None:
    q, k, v, bias = (x.requires_grad_() for x in block(rows=6, bias_heads=3))
    with torch.no_grad():
        bias.nan_to_num_(neginf=-2.0)
    options = Options(scale, softcap=3.0)
    logits = options.softcap * torch.tanh(scale * q @ k.repeat_interleave(3, 1).mT / options.softcap)
    logits = logits + bias.repeat_interleave(3, 1)[:, :, None]
    in_band = torch.ones(6, 6, dtype=torch.bool).tril()
    logits = logits.masked_fill(~in_band, -torch.inf)
    out = logits.softmax(-1) @ v.repeat_interleave(3, 1)
    dout = torch.cos(torch.arange(out.numel(), dtype=F64)).reshape(out.shape)
    expected = [out, logits.logsumexp(-1), *torch.autograd.grad(out, (q, k, v, bias), dout)]
    inputs = [x.detach() for x in (q, k, v, bias)]
    for name in ON_CPU:
        assert_same(both_passes(name, inputs, [Segment(0, 6, 0, 6, CAUSAL)], options), [x.detach() for x in expected])


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_exact_as_torchs_own_attention(name: str, dtype: torch.dtype) -> None:
    q, k, v, _ = block(dtype=dtype)
    segments = [Segment(0, 37, 0, 37, CAUSAL)]
    out, lse, *grads = both_passes(name, (q, k, v, None), segments)
    exact_out, exact_lse, *exact_grads = both_passes("reference", (q.to(F64), k.to(F64), v.to(F64), None), segments)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    own = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
    dout = torch.cos(torch.arange(own.numel(), dtype=F64)).reshape(own.shape).to(dtype)
    own_grads = torch.autograd.grad(own, leaves, dout)
    actual, theirs, exact = (out, *grads), (own, *own_grads), (exact_out, *exact_grads)
    for a, b, c in zip(actual, theirs, exact, strict=True):
        assert (a.to(F64) - c).norm() <= 1.5 * (b.to(F64) - c).norm()
    # lse is fp32 whatever the inputs. An error x in it scales a partial by 1 + x in a merge, so it must stay below what
    # rounding does to out anyway; in fp32 a few units in the last place of the largest logit.
    assert lse.dtype == torch.float32
    allowed = max(torch.finfo(dtype).eps / 8, 8 * torch.finfo(torch.float32).eps * exact_lse.abs().max().item())
    assert (lse.to(F64) - exact_lse).abs().max() <= allowed


@pytest.mark.parametrize("name", ON_CPU)
def test_an_empty_batch_has_empty_results(name: str) -> None:
    """Not every operator supports it: flex raises."""
    q, k, v, bias = (None if x is None else x[:0] for x in block(bias_heads=3))
    actual = both_passes(name, (q, k, v, bias), [Segment(0, 37, 0, 37, CAUSAL)])
    assert [x.shape for x in actual] == [x.shape for x in (q, q[..., 0], q, k, v, bias)]


@pytest.mark.parametrize("name", ON_CPU)
def test_segments_of_a_tile_add_up(name: str) -> None:
    """A causal square cut into a triangle, a rectangle and a triangle; rows of one segment overlap with rows of another."""
    inputs = block(rows=20, bias_heads=1)
    cut = [Segment(0, 12, 0, 12, CAUSAL), Segment(12, 20, 0, 12, FULL), Segment(12, 20, 12, 20, CAUSAL)]
    assert_same(both_passes(name, inputs, cut), both_passes("reference", inputs, [Segment(0, 20, 0, 20, CAUSAL)]))


@pytest.mark.parametrize("name", ON_CPU)
def test_large_logits_do_not_overflow(name: str) -> None:
    q, k, v, _ = block()
    inputs = [(q * 1e3).float(), (k * 1e3).float(), v.float(), None]
    actual = both_passes(name, inputs, [Segment(0, 37, 0, 37, CAUSAL)], Options(0.1))
    assert all(x.isfinite().all() for x in actual)
    assert actual[1].abs().max() > 1e4


@pytest.mark.parametrize("name", ON_CPU)
def test_any_memory_order_gives_the_same_numbers(name: str) -> None:
    """As from `qkv.unbind(-1)`, or a gradient that an einsum has permuted: the operators assume stride 1 without a check."""
    q, k, v, bias = block(bias_heads=3)
    segments = [Segment(0, 37, 0, 37, CAUSAL)]
    expected = both_passes(name, (q, k, v, bias), segments)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert odd[0].stride(-1) != 1
    assert_same(both_passes(name, (*odd, bias), segments), expected)
    reference = get("reference").forward(Operands(q, k, v, bias), segments, PLAIN)
    lse = reference.lse.masked_fill(reference.lse == -torch.inf, torch.inf)
    dout = torch.randn_like(reference.out)
    delta = (dout * reference.out).sum(-1)
    permuted = dout.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert_same(
        get(name).backward(Operands(q, k, v, bias), Rows(permuted, lse, delta), segments, PLAIN),
        get(name).backward(Operands(q, k, v, bias), Rows(dout, lse, delta), segments, PLAIN),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.125, 0.3, 2.5, -0.5])
def test_huge_biases_hide_keys_and_nothing_else(dtype: torch.dtype, scale: float) -> None:
    """Padding is often a bias of -1e4 or of finfo.min instead of -inf; as a partial it must lose every merge."""
    q, k, v, _ = block(dtype=dtype)
    segments = [Segment(0, 37, 0, 37, FULL)]
    visible = get("sdpa").forward(Operands(q, k, v, None), segments, Options(scale))
    for hidden in (-1e4, torch.finfo(torch.float32).min, torch.finfo(dtype).min if dtype != F64 else -1e300):
        bias = torch.full((2, 1, 37), hidden, dtype=F64 if dtype == F64 else torch.float32)
        part = get("sdpa").forward(Operands(q, k, v, bias), segments, Options(scale))
        assert part.lse.max() < -1000 and part.out.isfinite().all()
        total = Partial(visible.out.to(part.lse.dtype).clone(), visible.lse.clone())
        merge_(total, part)
        assert torch.equal(total.out, visible.out.to(total.out.dtype)) and torch.equal(total.lse, visible.lse)


def test_a_wide_window_is_computed_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "ROWS_PER_MASK", 4)
    inputs, segments = block(bias_heads=3), [Segment(0, 37, 0, 37, Band(-6, 1))]
    assert_same(both_passes("sdpa", inputs, segments), both_passes("reference", inputs, segments))
    assert len(get("sdpa").refine(segments)) == 10


def test_surrogate_out_has_the_right_delta_and_size() -> None:
    dout = torch.randn(50, 16, dtype=torch.float32)
    dout[0], dout[1], dout[2] = 0.0, dout[1] * 1e-30, dout[2] * 1e30
    out = torch.randn(50, 16)
    delta = (dout.double() * out).sum(-1).float()
    surrogate = surrogate_out(dout, delta)
    assert surrogate.isfinite().all() and (surrogate[0] == 0).all()
    ours = (dout.double() * surrogate).sum(-1)
    scale = dout.double().norm(dim=-1) * out.norm(dim=-1)
    assert ((ours - delta).abs() <= 1e-6 * scale).all()
    assert (surrogate.norm(dim=-1) <= out.norm(dim=-1) * (1 + 1e-5)).all()


# ---- merging


def partial_of(q, k, v) -> Partial:
    return get("reference").forward(Operands(q, k, v, None), [Segment(0, q.shape[2], 0, k.shape[2], FULL)], Options(0.3))


def test_merging_is_attention_to_all_keys_in_any_order() -> None:
    q, k, v, _ = block()
    reference = partial_of(q, k, v)
    for order in ([0, 1, 2], [2, 0, 1]):
        total = empty_partial(q.shape[:-1], 8, F64, q.device)
        for n in order:
            keys = slice(n * 13, (n + 1) * 13)
            merge_(total, partial_of(q, k[:, :, keys], v[:, :, keys]))
        assert_same(total, reference)


def test_merging_nothing_changes_nothing_and_keeps_nan() -> None:
    q, k, v, _ = block()
    reference = partial_of(q, k, v)
    total = empty_partial(q.shape[:-1], 8, F64, q.device)
    merge_(total, empty_partial(q.shape[:-1], 8, F64, q.device))
    assert (total.lse == -torch.inf).all() and (total.out == 0).all()
    merge_(total, reference)
    merge_(total, empty_partial(q.shape[:-1], 8, F64, q.device))
    assert torch.equal(total.out, reference.out) and torch.equal(total.lse, reference.lse)
    merge_(total, Partial(reference.out * torch.nan, reference.lse * torch.nan))
    assert total.out.isnan().all() and total.lse.isnan().all(), "NaN in the input must show in the output"
