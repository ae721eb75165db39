"""A merge is data: which rows of a sequence become one, and from where on the sequence may know of it.

Every policy returns one of these and everything else reads it, as with schedules and plans. It describes the whole sequence and
is the same on every rank: eight bytes a token, beside the thousands that its keys and values take. So where each group is, how
large it is and who has to send what to whom is arithmetic that every rank does for itself.

A group stands at its last row, its leader: what stands there has all of the group behind it. `ready` says when a group may be
known: it is its last row for what is decided by position, the end of the window for what is decided by looking at a window.
Groups keep the order of their leaders, so a causal mask over groups is a causal mask over their numbers.

What this module does not do: choose (the policies), or move anything (`exchange`).

Groups given from outside: words, the subtokens of an identifier, patches of a picture.

Rows between two ends become one, whose value is then their mean, their last row, or what a network weighs them by
(`nn.LearnedMean`). Word pooling: Thawani et al. 2023, https://arxiv.org/abs/2310.11628; identifiers in code:
https://arxiv.org/abs/2507.14423; grids: Matryoshka pooling, https://arxiv.org/abs/2405.17430.

Windows of a fixed number of rows become one: pooling, decided by position alone, so it needs neither data nor communication.

With `merge(how="last")` this is decimation, the baseline that every cleverer choice must beat; with "mean" it is average
pooling (Matryoshka pooling in one dimension: Cai et al. 2024, https://arxiv.org/abs/2405.17430). Windows may lie across ranks;
where they divide shards, nothing is sent.
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
    """Groups of the rows of a whole sequence, the same on every rank. Make one with a policy, or from labels: `Merge.of`.

    Attributes:
        into: int64 (batch, seq_len), for each row the position of its group's last row; -1 for one that is deleted.
        ready: int64 (batch, seq_len), for each row the first position that may know what becomes of it and of all rows before
            it; never falls. A group is known where its last row is.
        sees_all: why this merge cannot be used under a causal mask, in words; empty if it can.
    """

    into: Tensor
    ready: Tensor
    sees_all: str = ""

    @staticmethod
    def of(labels: Tensor, *, decided: Tensor | None = None, sees_all: str = "") -> Merge:
        """The merge in which rows with the same label are one.

        Args:
            labels: int64 (batch, seq_len) or (seq_len,), any numbers below seq_len; rows with a negative one are deleted.
            decided: int64, the same shape: the position at which it is decided what becomes of this row; its own by default,
                and seq_len or more where it never is within this sequence.
            sees_all: see `Merge`.

        Raises:
            InputError: labels or decided have another shape or dtype, or a label is out of range.
        """
        text("sees_all", sees_all, InputError)
        for name, given in (("labels", labels), *([("decided", decided)] if decided is not None else [])):
            as_strided_tensor(name, given)
        labels = labels[None] if labels.ndim == 1 else labels
        decided = decided[None] if decided is not None and decided.ndim == 1 else decided
        _check(labels, decided)
        batch, seq_len = labels.shape
        where = torch.arange(seq_len, device=labels.device).expand(batch, seq_len)
        slots = labels.where(labels >= 0, seq_len)  # what is deleted goes to a group of its own, which is then forgotten
        ends = torch.full((batch, seq_len + 1), DELETED, device=labels.device).scatter_reduce(1, slots, where, "amax")
        into = ends.gather(1, slots).where(labels >= 0, DELETED)
        # What is decided about a row before may tell of this one, so nothing is known earlier than what stands before it.
        ready = where if decided is None else torch.maximum(decided, where).cummax(1).values
        return Merge(into, ready, sees_all)

    @property
    def batch(self) -> int:
        return self.into.shape[0]

    @property
    def seq_len(self) -> int:
        return self.into.shape[1]

    @cached_property
    def leads(self) -> Tensor:
        """bool (batch, seq_len): whether a group stands here."""
        return self.into == torch.arange(self.seq_len, device=self.into.device)

    @cached_property
    def numbers(self) -> Tensor:
        """int64 (batch, seq_len): for each row the number of its group, in order; -1 for one that is deleted."""
        order = self.leads.cumsum(1) - 1
        return order.gather(1, self.into.clamp(min=0)).where(self.into >= 0, DELETED)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Groups in each sequence of the batch."""
        return tuple(self.leads.sum(1).tolist())

    @cached_property
    def latest(self) -> Tensor:
        """int64 (batch, seq_len): for each position the number of the last group that is ready there; -1 where none is."""
        ready = self.ready.where(self.leads, self.seq_len).clamp(max=self.seq_len)
        numbers = self.numbers.where(self.leads, DELETED)
        found = torch.full((self.batch, self.seq_len + 1), DELETED, device=self.into.device)
        return found.scatter_reduce(1, ready, numbers, "amax")[:, : self.seq_len].cummax(1).values

    @cached_property
    def digest(self) -> str:
        """16 hex digits that agree exactly when two merges are equal."""
        return sha256(self.into.cpu().numpy().tobytes() + self.ready.cpu().numpy().tobytes()).hexdigest()[:16]

    def then(self, after: Merge) -> Merge:
        """Both in a row as one: `after` merges the groups of this one, which are numbered as in `numbers`.

        Under a causal mask windows of `after` should not begin anew inside the sequence if this one deletes: a window that is
        cut short there would tell that nothing more of its document was kept.

        Raises:
            InputError: `after` is for another batch, or for another number of rows than there are groups here.
        """
        instance("after", after, Merge, InputError, "give a Merge of the groups that are left")
        if after.seq_len != max(self.counts) or after.batch not in (1, self.batch):
            raise InputError(
                f"then(after): this merge leaves {max(self.counts)} groups in {self.batch} sequences and `after` merges "
                f"{after.seq_len} rows of {after.batch}; make it for the groups that are left"
            )
        numbers, gone = self.numbers.clamp(min=0), self.numbers < 0
        labels = after.numbers.expand(self.batch, -1).gather(1, numbers).masked_fill(gone, DELETED)
        # When each group of this one is ready; never, where there is none: what waits for it is not known within the sequence.
        last = after.seq_len
        times = torch.full((self.batch, last + 1), self.seq_len, device=numbers.device)
        times = times.scatter(1, self.numbers.where(self.leads, last), self.ready.where(self.leads, self.seq_len))
        times[:, last] = self.seq_len
        known = times.gather(1, after.ready.expand(self.batch, -1).clamp(max=last))
        decided = known.gather(1, numbers).where(self.leads, 0)
        return Merge.of(labels, decided=decided, sees_all=self.sees_all or after.sees_all)


def device_for(device: torch.device | str) -> torch.device:
    """That of labels."""
    try:
        return torch.zeros(0, device=device).device
    except Exception as error:  # torch has many ways of saying that there is none
        raise InputError(
            f"device={short_repr(device)}; give a device that is here, as 'cpu' ({short_repr(str(error))})"
        ) from None


def _check(labels: Tensor, decided: Tensor | None) -> None:
    if labels.ndim != 2 or labels.dtype != torch.int64 or not labels.numel() or labels.is_meta:
        raise InputError(f"labels: {labels.dtype} of shape {tuple(labels.shape)}; give int64 (batch, seq_len), not empty")
    if int(labels.max()) >= labels.shape[1]:
        raise InputError(f"labels: {int(labels.max())} is in a sequence of {labels.shape[1]} rows; number groups from 0 on")
    if decided is not None and (decided.shape != labels.shape or decided.dtype != torch.int64):
        raise InputError(
            f"decided: {decided.dtype} of shape {tuple(decided.shape)}; give int64, one position for each row of labels, "
            f"{tuple(labels.shape)}"
        )


def segments(ends: Tensor, *, lookahead: int = 0) -> Merge:
    """Rows up to and with the next end become one.

    Args:
        ends: bool (batch, seq_len) or (seq_len,), the whole sequence, the same on every rank: whether a segment ends with this
            row. Rows behind the last end are one that is not complete: no row is told of it.
        lookahead: how many rows beyond an end had to be read to know that it is one: 0 where the end itself shows it (a space),
            1 where it shows in the next row (the start of a word). A causal model learns of the segment so much later.
    """
    ends = ends[None] if as_strided_tensor("ends", ends).ndim == 1 else ends
    if ends.dtype != torch.bool or ends.ndim != 2:
        raise InputError(f"ends: {ends.dtype} of shape {tuple(ends.shape)}; give bool (batch, seq_len)")
    lookahead = count("lookahead", lookahead, InputError, least=0, hint="it counts rows")
    number = ends.long().cumsum(1) - ends.long()  # ends before this row
    where = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    open_ended = number == ends.sum(1, keepdim=True)  # no end in sight: never known within the sequence
    return Merge.of(number, decided=(where + lookahead).masked_fill(open_ended, ends.shape[1]))


def grid(height: int, width: int, by: tuple[int, int] = (2, 2), *, batch: int = 1, device: torch.device | str = "cpu") -> Merge:
    """Patches of `by` = (rows, columns) of a picture of height x width become one; the sequence is the picture row by row."""
    if not isinstance(by, tuple | list) or len(by) != 2:
        raise InputError(f"by={short_repr(by)}; give rows and columns of a patch, as in (2, 2)")
    sides = {"height": height, "width": width, "by: rows": by[0], "by: columns": by[1], "batch": batch}
    height, width, rows, columns, batch = (as_int(name, value, InputError) for name, value in sides.items())
    if min(height, width, rows, columns, batch) < 1 or max(height, width, height * width * batch) > MOST_ROWS:
        said = f"grid({short_repr(height)}, {short_repr(width)}, by={short_repr((rows, columns))}), batch={short_repr(batch)}"
        raise InputError(f"{said}: all must be 1 or more, and no more than {MOST_ROWS:,} rows in all")
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
    """Every `factor` rows become one; causal.

    Args:
        seq_len: rows of the whole sequence.
        factor: rows in a window; the last may have fewer.
        protected: bool (seq_len,): rows that stay alone by where they stand, such as attention sinks. It must not hang on the
            data: that a row stays alone is known from the start. (What the data protects: `similar`, `segments`.)
        cu_seqlens: of packed documents: windows begin anew with each, and none holds rows of two.
        batch: sequences, all merged alike.
    """
    seq_len, factor = (
        count("seq_len", seq_len, InputError, most=MOST_ROWS),
        min(as_int("factor", factor, InputError), MOST_ROWS),
    )
    batch, cuts = count("batch", batch, InputError, most=MOST_ROWS // seq_len), counts("cu_seqlens", cu_seqlens, InputError)
    labels, ends = (found.to(device_for(device)) for found in runs(seq_len, factor, cuts))
    if protected is not None:
        if as_strided_tensor("protected", protected).dtype != torch.bool or tuple(protected.shape) != (seq_len,):
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
        raise InputError(f"windows of {short_repr(width)} rows: must be 1 or more")
    bounds = tuple(cu_seqlens) or (0, seq_len)
    if bounds[0] != 0 or bounds[-1] != seq_len or any(a > b for a, b in pairwise(bounds)):
        raise InputError(f"cu_seqlens={short_repr(list(bounds))}: must start with 0, never decrease and end with {seq_len}")
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
