"""Describes merges of sequence rows as data, and makes the merges that depend on positions alone.

Every policy returns a `Merge`. It describes the whole sequence and is the same on every rank: eight bytes a token, against
thousands for keys and values. Each rank computes from it, without communication, where groups lie, how large they are and what
is sent to whom.

A group stands at its last row, its leader, so all rows of the group are at or before that position. `ready` says from which
position on a group may be known: its last row where position decides, the end of the window where the content of a window
decides. Groups keep the order of their leaders, so a causal mask over groups is a causal mask over their numbers.

    segments    rows between given ends: words, the subtokens of an identifier
    grid        patches of an image
    windows     every `factor` rows; independent of data, no communication

`segments`: the value of a group is then the mean of its rows, the last row, or a weighted mean that a network learns
(`Merging(how="learned")`). Word pooling: Thawani et al. 2023, https://arxiv.org/abs/2310.11628; identifiers in code:
https://arxiv.org/abs/2507.14423; grids: Matryoshka pooling, Cai et al. 2024, https://arxiv.org/abs/2405.17430.
`windows`: with `merge(how="last")` this is decimation, the baseline for all other policies; with "mean" it is average pooling
(Matryoshka pooling in one dimension). Windows may lie across ranks; where they divide shards, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import pairwise

import torch
from torch import Tensor

from ringattn._validation import as_int, count, counts, instance, short_repr, text
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor

DELETED = -1
MOST_ROWS = 1 << 32  # of all sequences of a batch: eight bytes each


@dataclass(frozen=True, eq=False)
class Merge:
    """Groups of the rows of a whole sequence, the same on every rank. Made by a policy, or from labels by `Merge.of`.

    Attributes:
        into: int64 (batch, seq_len), for each row the position of its group's last row; -1 for one that is deleted.
        ready: int64 (batch, seq_len), for each row the first position that may depend on the merging of it and of all rows
            before it; nondecreasing. A group is known where its last row is ready.
        sees_all: why this merge cannot be used under a causal mask, in words; empty if it can.
    """

    into: Tensor
    ready: Tensor
    sees_all: str = ""

    @staticmethod
    def of(labels: Tensor, *, decided: Tensor | None = None, sees_all: str = "") -> Merge:
        """Makes the merge in which rows with the same label form a group.

        Args:
            labels: int64 (batch, seq_len) or (seq_len,), below seq_len; rows with a negative label are deleted.
            decided: int64, the same shape: the position at which the merging of this row is decided; its own by default, and
                seq_len or more where it is not decided within this sequence.
            sees_all: see `Merge`.

        Raises:
            InputError: labels or decided have another shape or dtype, or a label is out of range.
        """
        text("sees_all", sees_all, InputError)
        for name, tensor in (("labels", labels), *([("decided", decided)] if decided is not None else [])):
            as_strided_tensor(name, tensor)
        labels = labels[None] if labels.ndim == 1 else labels
        decided = decided[None] if decided is not None and decided.ndim == 1 else decided
        _check(labels, decided)
        batch, seq_len = labels.shape
        positions = torch.arange(seq_len, device=labels.device).expand(batch, seq_len)
        slots = labels.where(labels >= 0, seq_len)  # deleted rows go to an extra group, which is then dropped
        ends = torch.full((batch, seq_len + 1), DELETED, device=labels.device).scatter_reduce(1, slots, positions, "amax")
        into = ends.gather(1, slots).where(labels >= 0, DELETED)
        # The decision about an earlier row may depend on this one, so no row is ready before the rows that precede it.
        ready = positions if decided is None else torch.maximum(decided, positions).cummax(1).values
        return Merge(into, ready, sees_all)

    @property
    def batch(self) -> int:
        return self.into.shape[0]

    @property
    def seq_len(self) -> int:
        return self.into.shape[1]

    @cached_property
    def leads(self) -> Tensor:
        """bool (batch, seq_len): whether this row is the leader of a group."""
        return self.into == torch.arange(self.seq_len, device=self.into.device)

    @cached_property
    def numbers(self) -> Tensor:
        """int64 (batch, seq_len): for each row the number of its group, in order; -1 for a deleted row."""
        order = self.leads.cumsum(1) - 1
        return order.gather(1, self.into.clamp(min=0)).where(self.into >= 0, DELETED)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of groups in each sequence of the batch."""
        return tuple(self.leads.sum(1).tolist())

    @cached_property
    def latest(self) -> Tensor:
        """int64 (batch, seq_len): for each position the number of the last group that is ready there; -1 where none is."""
        ready = self.ready.where(self.leads, self.seq_len).clamp(max=self.seq_len)
        numbers = self.numbers.where(self.leads, DELETED)
        latest = torch.full((self.batch, self.seq_len + 1), DELETED, device=self.into.device)
        return latest.scatter_reduce(1, ready, numbers, "amax")[:, : self.seq_len].cummax(1).values

    @cached_property
    def digest(self) -> str:
        """16 hex digits of a hash, equal for equal merges."""
        return sha256(self.into.cpu().numpy().tobytes() + self.ready.cpu().numpy().tobytes()).hexdigest()[:16]

    def then(self, after: Merge) -> Merge:
        """Composes two merges: `after` merges the groups of this one, which are numbered as in `numbers`.

        Under a causal mask windows of `after` should not restart inside the sequence if this merge deletes rows: a window cut
        short there would reveal that no further row of its document is kept.

        Raises:
            InputError: `after` is for another batch, or for another number of rows than there are groups here.
        """
        instance("after", after, Merge, InputError, "give a Merge of the remaining groups")
        if after.seq_len != max(self.counts) or after.batch not in (1, self.batch):
            raise InputError(
                f"then(after): this merge leaves {max(self.counts)} groups in {self.batch} sequences and `after` merges "
                f"{after.seq_len} rows of {after.batch}; make it for the remaining groups"
            )
        numbers, deleted = self.numbers.clamp(min=0), self.numbers < 0
        labels = after.numbers.expand(self.batch, -1).gather(1, numbers).masked_fill(deleted, DELETED)
        # The position at which each group of this merge is ready; seq_len where there is no such group.
        last = after.seq_len
        times = torch.full((self.batch, last + 1), self.seq_len, device=numbers.device)
        times = times.scatter(1, self.numbers.where(self.leads, last), self.ready.where(self.leads, self.seq_len))
        times[:, last] = self.seq_len
        ready = times.gather(1, after.ready.expand(self.batch, -1).clamp(max=last))
        decided = ready.gather(1, numbers).where(self.leads, 0)
        return Merge.of(labels, decided=decided, sees_all=self.sees_all or after.sees_all)


def device_for(device: torch.device | str) -> torch.device:
    """The device of the labels to make; raises `InputError` where it does not exist."""
    try:
        return torch.zeros(0, device=device).device
    except Exception as error:  # torch raises various types for a device that does not exist
        raise InputError(
            f"device={short_repr(device)}; give an available device, such as 'cpu' ({short_repr(str(error))})"
        ) from None


def _check(labels: Tensor, decided: Tensor | None) -> None:
    if labels.ndim != 2 or labels.dtype != torch.int64 or not labels.numel() or labels.is_meta:
        raise InputError(f"labels: {labels.dtype} of shape {tuple(labels.shape)}; give int64 (batch, seq_len), not empty")
    if int(labels.max()) >= labels.shape[1]:
        raise InputError(f"labels: {int(labels.max())} is in a sequence of {labels.shape[1]} rows; number groups from 0")
    if decided is not None and (decided.shape != labels.shape or decided.dtype != torch.int64):
        raise InputError(
            f"decided: {decided.dtype} of shape {tuple(decided.shape)}; give int64, one position for each row of labels, "
            f"{tuple(labels.shape)}"
        )


def segments(ends: Tensor, *, lookahead: int = 0) -> Merge:
    """Merges the rows of each segment, up to and including its end.

    Args:
        ends: bool (batch, seq_len) or (seq_len,), the whole sequence, the same on every rank: whether a segment ends with this
            row. Rows after the last end form an incomplete segment, which no row may know.
        lookahead: rows beyond an end that must be read to recognise it: 0 where the end itself shows it (a space), 1 where the
            next row does (the start of a word). Under a causal mask the segment is ready that many rows later.
    """
    ends = ends[None] if as_strided_tensor("ends", ends).ndim == 1 else ends
    if ends.dtype != torch.bool or ends.ndim != 2:
        raise InputError(f"ends: {ends.dtype} of shape {tuple(ends.shape)}; give bool (batch, seq_len)")
    lookahead = count("lookahead", lookahead, InputError, least=0, hint="it counts rows")
    number = ends.long().cumsum(1) - ends.long()  # ends before this row
    positions = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    open_ended = number == ends.sum(1, keepdim=True)  # no end follows: not ready within the sequence
    return Merge.of(number, decided=(positions + lookahead).masked_fill(open_ended, ends.shape[1]))


def grid(height: int, width: int, by: tuple[int, int] = (2, 2), *, batch: int = 1, device: torch.device | str = "cpu") -> Merge:
    """Merges patches of `by` = (rows, columns) of an image of height x width; the sequence is the image row by row."""
    if not isinstance(by, tuple | list) or len(by) != 2:
        raise InputError(f"by={short_repr(by)}; give rows and columns of a patch, as in (2, 2)")
    sides = {"height": height, "width": width, "by: rows": by[0], "by: columns": by[1], "batch": batch}
    height, width, rows, columns, batch = (as_int(name, value, InputError) for name, value in sides.items())
    if min(height, width, rows, columns, batch) < 1 or max(height, width, height * width * batch) > MOST_ROWS:
        call = f"grid({short_repr(height)}, {short_repr(width)}, by={short_repr((rows, columns))}), batch={short_repr(batch)}"
        raise InputError(f"{call}: all must be 1 or more, with at most {MOST_ROWS:,} rows in total")
    row, column = torch.meshgrid(torch.arange(height) // rows, torch.arange(width) // columns, indexing="ij")
    labels = (row * -(-width // columns) + column).flatten()
    return Merge.of(labels.to(device_for(device)).expand(batch, -1))


def windows(
    seq_len: int,
    factor: int,
    *,
    protected: Tensor | None = None,
    cu_seqlens: Sequence[int] = (),
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Merge:
    """Merges every `factor` consecutive rows; causal.

    Args:
        seq_len: rows of the whole sequence.
        factor: rows in a window; the last may have fewer.
        protected: bool (seq_len,): rows that must not merge because of their position, such as attention sinks. It must not
            depend on the data, since it is known from the start; for protection by content see `similar` and `segments`.
        cu_seqlens: boundaries of packed documents; windows restart at each.
        batch: sequences, all merged in the same way.
        device: of the merge.
    """
    seq_len, factor = (
        count("seq_len", seq_len, InputError, most=MOST_ROWS),
        min(as_int("factor", factor, InputError), MOST_ROWS),
    )
    batch, cuts = count("batch", batch, InputError, most=MOST_ROWS // seq_len), counts("cu_seqlens", cu_seqlens, InputError)
    labels, ends = (tensor.to(device_for(device)) for tensor in window_bounds(seq_len, factor, cuts))
    if protected is not None:
        if as_strided_tensor("protected", protected).dtype != torch.bool or tuple(protected.shape) != (seq_len,):
            raise InputError(f"protected: {protected.dtype} of shape {tuple(protected.shape)}; give bool ({seq_len},)")
        # A window is labelled by a row of its own, so labels stay below seq_len.
        labels = isolate_rows(labels, protected.to(labels.device))
        # A protected row is ready at its own position.
        ends = torch.arange(seq_len, device=ends.device).where(protected.to(ends.device), ends)
    return Merge.of(labels.expand(batch, -1), decided=ends.expand(batch, -1))


def isolate_rows(labels: Tensor, protected: Tensor) -> Tensor:
    """`labels` with every protected row in a group of its own; a window is labelled by its last unprotected row."""
    seq_len = labels.shape[-1]
    positions = torch.arange(seq_len, device=labels.device).expand_as(labels)
    last = torch.zeros_like(labels).scatter_reduce(-1, labels, positions.where(~protected, 0), "amax").gather(-1, labels)
    return positions.where(protected, last)


def window_starts(seq_len: int, width: int, cu_seqlens: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(first row, rows) of each window of `width` rows; windows restart at each document."""
    if width < 1:
        raise InputError(f"windows of {short_repr(width)} rows: must be 1 or more")
    bounds = tuple(cu_seqlens) or (0, seq_len)
    if bounds[0] != 0 or bounds[-1] != seq_len or any(a > b for a, b in pairwise(bounds)):
        raise InputError(f"cu_seqlens={short_repr(list(bounds))}: must start with 0, never decrease and end with {seq_len}")
    return [(a, min(width, end - a)) for begin, end in pairwise(bounds) for a in range(begin, end, width)]


@lru_cache(maxsize=32)
def window_bounds(seq_len: int, width: int, cu_seqlens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """For each row the first and the last row of its window, two int64 (seq_len,).

    The last window ends at its full width, beyond the sequence if need be, so results do not depend on the sequence length.
    """
    windows = torch.tensor(window_starts(seq_len, width, cu_seqlens))
    last = windows.sum(1) - 1
    last[-1] = windows[-1, 0] + width - 1
    return windows[:, 0].repeat_interleave(windows[:, 1]), last.repeat_interleave(windows[:, 1])
