"""Defines a partial result of attention and merges two of them by log-sum-exp.

Softmax over all keys is the weighted mean of softmaxes over disjoint sets of keys, with weights from their log-sum-exp. Merging
is associative and commutative up to rounding; the engine merges in schedule order, so results are the same bits every time.

The weight form used here, sigmoid of a difference, never overflows: derivation at
https://github.com/zhuzilin/ring-flash-attention/pull/34#issuecomment-2076126795. Rows that have attended to no key have out 0
and lse -inf, and two such rows merge to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of some queries to some keys."""

    out: Tensor  # (batch, heads, rows, head_dim)
    lse: Tensor  # (batch, heads, rows), natural log; -inf for a row without keys


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_partial(rows: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Partial:
    """The neutral element of `merge_` for `rows` = (batch, heads, rows): rows without keys."""
    lse = torch.full(tuple(rows), -torch.inf, dtype=accum_dtype(dtype), device=device)
    return Partial(torch.zeros(*rows, dim, dtype=dtype, device=device), lse)


def merge_(into: Partial, part: Partial) -> None:
    """Merge `part` into `into`, in place; `into` must be in the accumulation dtype."""
    # Two empty rows give -inf minus -inf; NaN from the inputs must survive, so only empty parts are masked.
    weight = torch.sigmoid(part.lse - into.lse).masked_fill_(part.lse == -torch.inf, 0.0)
    into.out.lerp_(part.out.to(into.out.dtype), weight.unsqueeze(-1))
    into.lse.copy_(torch.logaddexp(into.lse, part.lse))
