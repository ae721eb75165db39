"""Groups given from outside: words, the subtokens of an identifier, patches of a picture.

Rows between two ends become one, whose value is then their mean, their last row, or what a network weighs them by
(`nn.LearnedMean`). Word pooling: Thawani et al. 2023, https://arxiv.org/abs/2310.11628; identifiers in code:
https://arxiv.org/abs/2507.14423; grids: Matryoshka pooling, https://arxiv.org/abs/2405.17430.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.arguments import count, shown, whole
from ringattn.callers import dense
from ringattn.compress.merge import MOST_ROWS, Merge, device_for
from ringattn.errors import InputError


def segments(ends: Tensor, *, lookahead: int = 0) -> Merge:
    """Rows up to and with the next end become one.

    Args:
        ends: bool (batch, seq_len) or (seq_len,), the whole sequence, the same on every rank: whether a segment ends with this
            row. Rows behind the last end are one that is not complete: no row is told of it.
        lookahead: how many rows beyond an end had to be read to know that it is one: 0 where the end itself shows it (a space),
            1 where it shows in the next row (the start of a word). A causal model learns of the segment so much later.
    """
    ends = ends[None] if dense("ends", ends).ndim == 1 else ends
    if ends.dtype != torch.bool or ends.ndim != 2:
        raise InputError(f"ends: {ends.dtype} of shape {tuple(ends.shape)}; give bool (batch, seq_len)")
    lookahead = count("lookahead", lookahead, InputError, least=0, cure="it counts rows")
    number = ends.long().cumsum(1) - ends.long()  # ends before this row
    where = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    open_ended = number == ends.sum(1, keepdim=True)  # no end in sight: never known within the sequence
    return Merge.of(number, decided=(where + lookahead).masked_fill(open_ended, ends.shape[1]))


def grid(height: int, width: int, by: tuple[int, int] = (2, 2), *, batch: int = 1, device: torch.device | str = "cpu") -> Merge:
    """Patches of `by` = (rows, columns) of a picture of height x width become one; the sequence is the picture row by row."""
    if not isinstance(by, tuple | list) or len(by) != 2:
        raise InputError(f"by={shown(by)}; give rows and columns of a patch, as in (2, 2)")
    sides = {"height": height, "width": width, "by: rows": by[0], "by: columns": by[1], "batch": batch}
    height, width, rows, columns, batch = (whole(name, value, InputError) for name, value in sides.items())
    if min(height, width, rows, columns, batch) < 1 or max(height, width, height * width * batch) > MOST_ROWS:
        said = f"grid({shown(height)}, {shown(width)}, by={shown((rows, columns))}), batch={shown(batch)}"
        raise InputError(f"{said}: all must be 1 or more, and no more than {MOST_ROWS:,} rows in all")
    row, column = torch.meshgrid(torch.arange(height) // rows, torch.arange(width) // columns, indexing="ij")
    labels = (row * -(-width // columns) + column).flatten()
    return Merge.of(labels.to(device_for(device)).expand(batch, -1))
