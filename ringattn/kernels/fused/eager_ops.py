"""The merges and row statistics of `fused` in torch's operators: on any device, in any floating-point dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringattn.partial import accum_dtype

if TYPE_CHECKING:
    from ringattn.kernels.fused import PartialRows, SumRows


def merge(parts: Sequence[PartialRows], out: Tensor, lse: Tensor) -> None:
    rows = lse.shape[2]
    if len(parts) == 1:
        (part,) = parts
        _clear_outside(out, part.start, part.stop, 0.0)
        _clear_outside(lse, part.start, part.stop, -torch.inf)
        out.narrow(2, part.start, part.stop - part.start).copy_(part.out)
        lse.narrow(2, part.start, part.stop - part.start).copy_(part.lse)
        return
    whole = all(part.stop - part.start == rows for part in parts)
    lses = torch.stack([part.lse if whole else _placed(part, rows) for part in parts])
    largest = lses.amax(0)
    # Where no part has seen a key, -inf minus -inf would be NaN; NaN from the inputs must survive.
    exps = lses.sub_(largest.masked_fill(largest == -torch.inf, 0.0)).exp_()
    sum_of_exps = exps.sum(0).clamp_min_(1.0)  # the largest alone adds 1, so this changes only rows that see nothing
    torch.add(largest, sum_of_exps.log(), out=lse)
    weights = exps.div_(sum_of_exps).unsqueeze(-1).unbind(0)
    if whole:
        total = parts[0].out * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.addcmul_(part.out, weight)
    else:
        total = lse.new_zeros(out.shape)
        for part, weight in zip(parts, weights, strict=True):
            start, count = part.start, part.stop - part.start
            total.narrow(2, start, count).addcmul_(part.out, weight.narrow(2, start, count))
    out.copy_(total)


def add(parts: Sequence[SumRows], total: Tensor) -> None:
    first, *others = parts
    rows, dtype = total.shape[2], accum_dtype(first.values.dtype)
    if len(parts) == 2 and dtype in (first.values.dtype, others[0].values.dtype) and all(_covers(part, rows) for part in parts):
        torch.add(first.values, others[0].values, out=total)  # in `dtype`, since one of them is
        return
    wide = total if not others or total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    _clear_outside(wide, first.start, first.stop, 0.0)
    (wide if _covers(first, rows) else wide.narrow(2, first.start, first.stop - first.start)).copy_(first.values)
    for part in others:
        (wide if _covers(part, rows) else wide.narrow(2, part.start, part.stop - part.start)).add_(part.values)
    if wide is not total:
        total.copy_(wide)


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    # Norms are taken in fp64, where the square of no fp32 number is lost; a row too small even so, or zero, has no gradient to
    # speak of and gets a bounded factor.
    norm: Tensor = torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float64)
    factor = (delta / norm / norm).masked_fill_(norm == 0, 0.0).clamp_(-1e37, 1e37).to(delta.dtype)
    return (dout * factor.unsqueeze(-1)).to(dout.dtype)


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    delta = (dout.to(lse.dtype) * out).sum(-1)
    return delta, lse.masked_fill(lse == -torch.inf, torch.inf)


def _covers(part: PartialRows | SumRows, rows: int) -> bool:
    return part.stop - part.start == rows


def _placed(part: PartialRows, rows: int) -> Tensor:
    """lse of the whole block, -inf outside of the part."""
    return torch.nn.functional.pad(part.lse, (part.start, rows - part.stop), value=-torch.inf)


def _clear_outside(x: Tensor, start: int, stop: int, value: float) -> None:
    if start:
        x.narrow(2, 0, start).fill_(value)
    if stop < x.shape[2]:
        x.narrow(2, stop, x.shape[2] - stop).fill_(value)
