"""Other libraries, as the benchmarks run them: each gives what dense attention gives, gradients included, so its time counts.

flash-attn's names on a CPU and torch's ring need nothing installed; the others are skipped where the extra `bench` is not.
"""

import sys
import time
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import MASKS, example, worst
from spawn import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peers import LIBRARIES, Setting, deepspeed_ulysses, flash_on_cpu, torch_ring
from peers.local import Cpu, Emulated

from ringattn.kernels import Operands, Options, Rows, get
from ringattn.sequence.segments import CAUSAL, FULL, Segment

ROWS = 12
# Query heads, KV heads: as many, fewer, and (for Ulysses on four ranks) a number that does not divide.
HEADS = ((8, 8), (8, 4), (6, 6))
# Libraries around flash-attn are right in 16 bits only (see their files). Nothing here is larger than 8, so rounding once is
# 0.016; a few roundings stay below what leaving out or repeating a block would change, which is 0.3 and more.
FP32, BF16 = 3e-6, 0.06
cached_example = lru_cache(maxsize=None)(lambda heads, length, mask: example(heads, length, MASKS[mask], batch=1, dim=16))
masks = pytest.mark.parametrize("mask", MASKS)


def errors(rank: int, world: int, library: int, dtype: str) -> dict[tuple[str, str, int, int], float]:
    """Of every variant in every setting that it supports, the largest error of this rank over out, dq, dk and dv."""
    actual = {}
    for mask, (heads, kv_heads) in product(MASKS, HEADS):
        setting = Setting(world, rank, ROWS, heads, kv_heads, mask == "causal", dtype)
        e = cached_example((heads, kv_heads), setting.seq_len, mask)
        for peer in LIBRARIES[library].peers(setting):
            if peer.supports(setting) is None:
                layout = peer.layout(setting)
                layout.validate(setting.seq_len)
                at = torch.tensor(layout.positions(rank))
                q, k, v, dout = (x.detach()[:, at].to(getattr(torch, dtype)) for x in (e.q, e.k, e.v, e.dout))
                leaves = [x.requires_grad_() for x in (q, k, v)]
                out = peer.build(setting)(*leaves)
                grads = torch.autograd.grad(out, leaves, dout)
                expected = [x.detach()[:, at] for x in (e.out, *e.grads)]
                result = tuple(x.detach().double() for x in (out, *grads))
                actual[peer.name, mask, heads, kv_heads] = worst(result, tuple(expected))
    return actual


@pytest.mark.parametrize("library", range(len(LIBRARIES)), ids=[x.__name__.removeprefix("peers.") for x in LIBRARIES])
@pytest.mark.parametrize("world", [2, 4])
def test_every_peer_equals_dense_attention(library: int, world: int) -> None:
    peers = LIBRARIES[library].peers(Setting(world, 0, ROWS, 8, 8, causal=True))
    if any(find_spec(needs) is None for needs in {peer.needs for peer in peers}):
        pytest.skip("the extra `bench` is not installed")
    dtype, limit = ("float32", FP32) if LIBRARIES[library] in (torch_ring, deepspeed_ulysses) else ("bfloat16", BF16)
    actual = run_ranks(world, errors, world, library, dtype)
    assert actual[0]
    assert {case: e for rank in actual for case, e in rank.items() if not e < limit} == {}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", FP32), ("float64", 1e-12)])
@pytest.mark.parametrize("rows", [19, 7])
@masks
def test_flash_attn_on_a_cpu_equals_dense_attention(mask: str, rows: int, dtype: str, limit: float) -> None:
    """Also for the last of the rows only, which is where flash-attn's causal mask ends and torch's begins."""
    flash_on_cpu.install(0)
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward, flash_attn_func

    e = cached_example((6, 2), 19, mask)
    q, out, dout = (x.detach()[:, -rows:].to(getattr(torch, dtype)) for x in (e.q, e.out, e.dout))
    k, v = (x.detach().to(getattr(torch, dtype)) for x in (e.k, e.v))
    plain, scale = (-1, -1, 0.0, None), 16**-0.5
    result, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, mask == "causal", *plain, False)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(dout, q, k, v, result, lse, *grads, 0.0, scale, mask == "causal", *plain, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    differentiable = flash_attn_func(*leaves, causal=mask == "causal")
    expected = _dense_of_rows(e, rows, mask)
    assert worst((result.double(), lse.double()), (e.out.detach()[:, -rows:], e.lse[:, :, -rows:])) < limit
    assert worst(tuple(x.double() for x in grads), expected) < limit
    assert worst(torch.autograd.grad(differentiable, leaves, dout), tuple(grads)) < limit
    assert worst((differentiable.detach(),), (out,)) < limit


def _dense_of_rows(e, rows: int, mask: str) -> tuple[torch.Tensor, ...]:
    from meaning import dense

    out, _ = dense(e.q, e.k, e.v, MASKS[mask])
    dq, dk, dv = torch.autograd.grad(out[:, -rows:], (e.q, e.k, e.v), e.dout[:, -rows:])
    return dq[:, -rows:], dk, dv


@pytest.mark.parametrize("parts", [1, 3])
def test_a_block_of_keys_gives_its_share_of_the_gradients(parts: int) -> None:
    """From the out and lse of whole rows, in memory as rings leave them: the shares sum to dense attention's gradients."""
    e = cached_example((6, 2), 18, "full")
    q, k, v, out, dout = (x.detach().transpose(1, 2) for x in (e.q, e.k, e.v, e.out, e.dout))
    lse = e.lse.transpose(1, 2).contiguous().transpose(1, 2)
    blocks = zip(k.chunk(parts, dim=2), v.chunk(parts, dim=2), strict=True)
    shares = [Cpu().backward(dout, q, *block, out, lse, False, 16**-0.5) for block in blocks]
    result = (sum(dq for dq, *_ in shares), *(torch.cat([share[n] for share in shares], dim=2) for n in (1, 2)))
    assert worst(result, tuple(x.transpose(1, 2) for x in e.grads)) < 1e-12


def test_the_emulated_accelerator_takes_the_time_of_the_flops_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    q, k = torch.randn(1, 6, 8, 16, dtype=torch.bfloat16), torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    out, lse = Emulated(1e6).forward(q, k, k, True, 1.0)
    grads = Emulated(1e6).backward(q, q, k, k, out, lse, True, 1.0)
    Emulated(1e6).forward(q[:, :, 5:], k, k, True, 1.0)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:-1], torch.float32)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]

    block, whole = Operands(q, k, k, None), [Segment(0, 8, 0, 8, CAUSAL)]
    last = [Segment(0, 3, 0, 5, FULL), Segment(0, 3, 5, 8, CAUSAL)]
    ours = get("emulated:1e6")
    ours.forward(block, whole, Options(1.0))
    ours.backward(block, Rows(q, lse, lse), whole, Options(1.0))
    ours.forward(Operands(q[:, :, 5:], k, k, None), last, Options(1.0))
    assert slept[:3] == pytest.approx(slept[3:])
