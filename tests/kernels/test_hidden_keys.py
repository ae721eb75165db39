"""Keys hidden by a bias of -inf: a weight of exactly 0 in every kernel and dtype, however many stand side by side.

flash-attn 2 and 3 return NaN for two whole blocks of -inf before the first visible key (`standins` iterate as they do),
so 300 hidden keys against blocks of 64 or 128 are the case that a few hidden keys never test.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from cases import EXACT, example, simulate, worst
from meaning import dense
from standins import SIGNATURES, module
from test_kernels import assert_same

from ringattn import causal, full, kernels, make_plan
from ringattn.kernels import KERNELS, Operands, Options, Rows, get
from ringattn.kernels.adapters import with_bias
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment

with suppress(ImportError):  # before stand-ins are in the place of packages that transformers looks for
    import ringattn.integrations.transformers.batch  # noqa: F401

KEYS, HIDDEN = 400, 300
PLACES = {"end": slice(KEYS - HIDDEN, KEYS), "start": slice(0, HIDDEN), "middle": slice(50, 50 + HIDDEN), "all": slice(0, KEYS)}
F64 = torch.float64


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins of flash-attn 2, 3 and 4 wherever a kernel is requested by name."""
    kernels.get.cache_clear()
    for name in ("flash2", "flash3", "flash4"):
        monkeypatch.setitem(sys.modules, KERNELS[name].package.module, module(name))
    yield
    kernels.get.cache_clear()


def tensors(place: str) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(2, heads, KEYS, 8, generator=source, dtype=F64) for heads in (4, 2, 2, 4))
    bias = torch.randn(2, 2, KEYS, generator=source, dtype=F64)
    bias[0, 0, PLACES[place]] = -torch.inf  # one head of one sequence: the others have all keys
    bias[1, :, PLACES[place]] = -torch.inf
    return q, k, v, bias, dout


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(-150, 20)], ids=str)
@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "sdpa", "flex"])
def test_many_hidden_keys_side_by_side(name: str, band: Band, place: str, packages: None) -> None:
    """Forward and backward equal plain mathematics; hidden keys have gradients of exactly 0, rows without keys too."""
    q, k, v, bias, dout = tensors(place)
    block, segments, options = Operands(q, k, v, bias), [Segment(0, KEYS, 0, KEYS, band)], Options(0.3)
    expected = get("reference").forward(block, segments, options)
    assert_same(get(name).forward(block, segments, options), expected)
    lse = expected.lse.masked_fill(expected.lse == -torch.inf, torch.inf)
    rows = Rows(dout, lse, (dout * expected.out).sum(-1))
    grads = get(name).backward(block, rows, segments, options)
    assert_same(grads, get("reference").backward(block, rows, segments, options))
    hidden = bias == -torch.inf
    for grad in grads[1:]:
        assert not grad[hidden].any()
    assert not grads.dq[expected.lse == -torch.inf].any()


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "sdpa"])
def test_a_block_of_hidden_keys_beside_a_visible_one(name: str, packages: None) -> None:
    """Backward with the statistics of whole rows, over a block that is hidden altogether."""
    q, k, v, bias, dout = tensors("end")
    options = Options(0.3)
    reference = get("reference").forward(Operands(q, k, v, bias), [Segment(0, KEYS, 0, KEYS, FULL)], options)
    rows = Rows(dout, reference.lse, (dout * reference.out).sum(-1))
    keys = slice(KEYS - HIDDEN, KEYS)
    part = Operands(q[1:], k[1:, :, keys], v[1:, :, keys], bias[1:, :, keys])
    segments = [Segment(0, KEYS, 0, HIDDEN, FULL)]
    out, lse = get(name).forward(part, segments, options)
    assert not out.any() and (lse == -torch.inf).all()
    grads = get(name).backward(part, Rows(dout[1:], rows.lse[1:], rows.delta[1:]), segments, options)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("mask", [full(), causal()], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("schedule", ["ring", "token_ring"])
@pytest.mark.parametrize("kernel", ["flash2", "flash3"])
def test_a_padded_batch_over_ranks(kernel: str, schedule: str, layout: str, mask, packages: None) -> None:
    """Right padding as the transformers integration hands it on: out, lse and gradients are those of dense attention."""
    transformers = pytest.importorskip("ringattn.integrations.transformers.batch")
    tokens = torch.ones(2, KEYS, dtype=torch.long)
    tokens[1, KEYS - HIDDEN :] = 0
    bias = transformers.padding_of(tokens, None)
    e = example((4, 2), KEYS, mask)
    plan = make_plan(
        KEYS,
        world=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        dtype="float64",
        mask=mask,
        schedule=schedule,
        layout=layout,
        kernel=kernel,
    )
    out, lse = dense(e.q, e.k, e.v, mask, key_bias=bias)
    expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, (e.q, e.k, e.v), e.dout))
    assert worst(simulate_with(plan, e, bias), expected) < EXACT


def simulate_with(plan, e, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return simulate(plan, e.q, e.k, e.v, e.dout, key_bias=bias.requires_grad_())[:5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0625, 0.3, 2.5, 1e-6])
def test_hidden_logits_are_finite_and_lose_to_every_other(dtype: torch.dtype, scale: float) -> None:
    """Also against keys that are nearly hidden by a finite bias of any size, in fp32 as kernels sum them, times log2(e)."""
    finfo = torch.finfo(dtype)
    q, k = torch.randn(2, 1, 1, 6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    least = max(finfo.min, torch.finfo(torch.float32).min)
    bias = torch.tensor([[[0.0, -3.0, least, -1e4, -torch.inf, -torch.inf]]], dtype=F64 if dtype == F64 else torch.float32)
    wide_q, wide_k = with_bias(q, k, bias, scale)
    assert wide_q.isfinite().all() and wide_k.isfinite().all()
    sums = wide_q.float() @ wide_k.float().mT
    logits = sums * (scale * math.log2(math.e))
    assert sums.isfinite().all() and logits.isfinite().all()
    live, hidden = logits[..., :4], logits[..., 4:]
    # exp2 of less than -1075 is 0 in fp64, and of less than -150 in fp32. A scale that fp16 cannot undo leaves the smaller.
    assert (hidden.amax(-1) < live.amin(-1) - (1075 if scale > 1e-4 else 150)).all()
    # Finite biases are still themselves: fp32 holds 24 bits of the sum, fp16 and bf16 hold 22 and 16 in two channels.
    scores = scale * (q.float() @ k.float().mT)
    actual, digits = sums[..., :2] * scale - scores[..., :2], {torch.float16: 1e-3, torch.bfloat16: 1e-4}.get(dtype, 1e-5)
    torch.testing.assert_close(actual, bias.float().unsqueeze(-2).expand_as(scores)[..., :2], rtol=digits, atol=1e-5)


def test_the_stand_ins_fail_where_the_packages_do() -> None:
    """The trap is there: -inf in a channel of k, as it once was, is NaN in flash-attn 2 and 3 and not in 4."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, KEYS, 1, 8, generator=source, dtype=F64) for _ in range(3))
    q[..., 0], k[:, -HIDDEN:, :, 0] = 1.0, -torch.inf
    arguments = dict(q=q, k=k, v=v, softmax_scale=0.3, causal=False, softcap=0.0, window_size_left=-1, window_size_right=-1)
    for name in ("flash2", "flash3, later", "flash4"):
        function = next(f for f in SIGNATURES[name] if f.endswith(("_forward", "_fwd")))
        required = dict.fromkeys(SIGNATURES[name][function].split())
        more = {"flash4": dict(return_lse=True, window_size_left=None, window_size_right=None)}.get(name, {})
        out, lse, *_ = getattr(module(name), function)(**{n: (arguments | more).get(n) for n in required})
        assert out.isnan().all().item() is (name != "flash4")
        assert (lse == torch.inf).all().item() is (name != "flash4")
