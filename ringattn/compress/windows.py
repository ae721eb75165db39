"""Windows of a fixed number of rows become one: pooling, decided by position alone, so it needs neither data nor communication.

With `merge(how="last")` this is decimation, the baseline that every cleverer choice must beat; with "mean" it is average
pooling (Matryoshka pooling in one dimension: Cai et al. 2024, https://arxiv.org/abs/2405.17430). Windows may lie across ranks;
where they divide shards, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ringattn.arguments import count, counts, shown, whole
from ringattn.callers import dense
from ringattn.compress.merge import MOST_ROWS, Merge, device_for
from ringattn.errors import InputError


def windows(
    seq_len: int,
    factor: int,
    *,
    protected: Tensor | None = None,
    cu_seqlens: Sequence[int] = (),
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Merge:
    """Every `factor` rows become one; causal.

    Args:
        seq_len: rows of the whole sequence.
        factor: rows in a window; the last may have fewer.
        protected: bool (seq_len,): rows that stay alone by where they stand, such as attention sinks. It must not hang on the
            data: that a row stays alone is known from the start. (What the data protects: `similar`, `segments`.)
        cu_seqlens: of packed documents: windows begin anew with each, and none holds rows of two.
        batch: sequences, all merged alike.
    """
    seq_len, factor = count("seq_len", seq_len, InputError, most=MOST_ROWS), min(whole("factor", factor, InputError), MOST_ROWS)
    batch, cuts = count("batch", batch, InputError, most=MOST_ROWS // seq_len), counts("cu_seqlens", cu_seqlens, InputError)
    labels, ends = (found.to(device_for(device)) for found in runs(seq_len, factor, cuts))
    if protected is not None:
        if dense("protected", protected).dtype != torch.bool or tuple(protected.shape) != (seq_len,):
            raise InputError(f"protected: {protected.dtype} of shape {tuple(protected.shape)}; give bool ({seq_len},)")
        # Numbers of windows stay below those of rows as long as each is the first row of its window.
        labels = alone(labels, protected.to(labels.device))
        # A row that stays alone is known at once.
        ends = torch.arange(seq_len, device=ends.device).where(protected.to(ends.device), ends)
    return Merge.of(labels.expand(batch, -1), decided=ends.expand(batch, -1))


def alone(labels: Tensor, protected: Tensor) -> Tensor:
    """`labels`, numbers of rows, with every protected row in a group of its own: windows go by their last other row."""
    seq_len = labels.shape[-1]
    where = torch.arange(seq_len, device=labels.device).expand_as(labels)
    last = torch.zeros_like(labels).scatter_reduce(-1, labels, where.where(~protected, 0), "amax").gather(-1, labels)
    return where.where(protected, last)


def starts(seq_len: int, width: int, cu_seqlens: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(first row, rows) of each window of `width` rows, beginning anew with each document."""
    if width < 1:
        raise InputError(f"windows of {shown(width)} rows: must be 1 or more")
    bounds = tuple(cu_seqlens) or (0, seq_len)
    if bounds[0] != 0 or bounds[-1] != seq_len or any(a > b for a, b in pairwise(bounds)):
        raise InputError(f"cu_seqlens={shown(list(bounds))}: must start with 0, never decrease and end with {seq_len}")
    return [(a, min(width, end - a)) for begin, end in pairwise(bounds) for a in range(begin, end, width)]


@lru_cache(maxsize=32)
def runs(seq_len: int, width: int, cu_seqlens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two int64 (seq_len,): for each row the first row of its window, and the last one.

    A window that the end of the sequence cuts short ends where it would: nothing hangs on where a sequence happens to end.
    """
    found = torch.tensor(starts(seq_len, width, cu_seqlens))
    last = found.sum(1) - 1
    last[-1] = found[-1, 0] + width - 1
    return found[:, 0].repeat_interleave(found[:, 1]), last.repeat_interleave(found[:, 1])
