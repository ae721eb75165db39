"""Never time a wrong answer: one KV head and its queries, out and gradients, against dense attention on this rank's rows.

The error is that of a tensor as a whole, |found - expected| / |expected|. Dense attention in the same dtype has one too, by
rounding, and is told beside. Small mistakes in a few rows pass; they are the tests' to find.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from peers.base import Attention

WRONG = 0.03  # rounding to bf16 costs a tenth of this; a block too few or too many costs more


class Whole(NamedTuple):
    """All rows of the sequence, the same on every rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def rows(self, positions: Tensor) -> Whole:
        return Whole(*(x[:, positions] for x in self))


def error(attention: Attention, whole: Whole, positions: Tensor, causal: bool, backward: bool) -> float:
    """Of this rank's rows: the largest over out, dq, dk and dv."""
    group = whole.q.shape[2] // whole.k.shape[2]
    results = _run(attention, whole.rows(positions), backward)
    expected = _dense(whole, positions, causal, torch.float32)
    heads = (group, group, 1, 1)
    return max(_distance(a[:, :, :n], b) for a, b, n in zip(results, expected, heads, strict=False))


def error_of_dense(whole: Whole, positions: Tensor, causal: bool) -> float:
    """What attention on one device in this dtype loses."""
    results, expected = (_dense(whole, positions, causal, dtype) for dtype in (whole.q.dtype, torch.float32))
    return max(map(_distance, results, expected))


def _run(attention: Attention, shard: Whole, backward: bool) -> tuple[Tensor, ...]:
    q, k, v = (x.clone().requires_grad_() for x in shard[:3])
    out = attention(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), shard.dout)) if backward else (out.detach(),)


def _dense(whole: Whole, positions: Tensor, causal: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of this rank's rows and the first KV head; dk and dv are summed over the ranks' queries."""
    group = whole.q.shape[2] // whole.k.shape[2]
    q, dout = (x[:, positions, :group].transpose(1, 2).to(dtype) for x in (whole.q, whole.dout))
    k, v = (x[:, :, :1].transpose(1, 2).to(dtype) for x in (whole.k, whole.v))
    leaves = q, k, v = tuple(x.clone().requires_grad_() for x in (q, k, v))
    keep = positions[:, None] >= torch.arange(k.shape[2]) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=group > 1)
    dq, *of_keys = torch.autograd.grad(out, leaves, dout)
    for grad in (sums := [x.float() for x in of_keys]):
        dist.all_reduce(grad)
    out, dq, dk, dv = (x.detach().transpose(1, 2) for x in (out, dq, *sums))
    return out, dq, dk[:, positions], dv[:, positions]


def _distance(results: Tensor, expected: Tensor) -> float:
    distance: float = ((results.float() - expected.float()).norm() / expected.float().norm()).item()
    return distance
