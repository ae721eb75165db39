"""Merges partial results and computes row statistics with torch's operators, on any device and in any floating-point dtype.

Parts are merged one after the other: on a CPU that is faster than computing the weights of all of them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringattn.kernels.lse import Partial, accum_dtype, merge_

if TYPE_CHECKING:
    from ringattn.kernels.fused import PartialRows, SumRows


def merge(parts: Sequence[PartialRows], out: Tensor, lse: Tensor) -> None:
    first, *others = parts
    wide = out if not others or out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    for target, values, empty in ((wide, first.out, 0.0), (lse, first.lse, -torch.inf)):
        _clear_outside(target, first.start, first.stop, empty)
        _rows(target, first).copy_(values)
    for part in others:
        merge_(Partial(_rows(wide, part), _rows(lse, part)), Partial(part.out, part.lse))
    if wide is not out:
        out.copy_(wide)


def add(parts: Sequence[SumRows], total: Tensor) -> None:
    first, *others = parts
    rows, dtype = total.shape[2], accum_dtype(first.values.dtype)
    if len(parts) == 2 and dtype in (first.values.dtype, others[0].values.dtype) and all(_covers(part, rows) for part in parts):
        torch.add(first.values, others[0].values, out=total)  # in `dtype`, since one of them is
        return
    wide = total if not others or total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    _clear_outside(wide, first.start, first.stop, 0.0)
    _rows(wide, first).copy_(first.values)
    for part in others:
        _rows(wide, part).add_(part.values)
    if wide is not total:
        total.copy_(wide)


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    # Norms are taken in fp64, where the square of no fp32 number is lost; a row that is even smaller, or zero, has a
    # negligible gradient and gets a bounded factor.
    norm: Tensor = torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float64)
    factor = (delta / norm / norm).masked_fill_(norm == 0, 0.0).clamp_(-1e37, 1e37).to(delta.dtype)
    return (dout * factor.unsqueeze(-1)).to(dout.dtype)


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    delta = (dout.to(lse.dtype) * out).sum(-1)
    return delta, lse.masked_fill(lse == -torch.inf, torch.inf)


def _covers(part: PartialRows | SumRows, rows: int) -> bool:
    return part.stop - part.start == rows


def _rows(block: Tensor, part: PartialRows | SumRows) -> Tensor:
    """The rows of a block that `part` covers."""
    return block if _covers(part, block.shape[2]) else block.narrow(2, part.start, part.stop - part.start)


def _clear_outside(x: Tensor, start: int, stop: int, value: float) -> None:
    if start:
        x.narrow(2, 0, start).fill_(value)
    if stop < x.shape[2]:
        x.narrow(2, stop, x.shape[2] - stop).fill_(value)
