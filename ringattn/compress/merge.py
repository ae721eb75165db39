"""A merge is data: which rows of a sequence become one, and from where on the sequence may know of it.

Every policy returns one of these and everything else reads it, as with schedules and plans. It describes the whole sequence and
is the same on every rank: eight bytes a token, beside the thousands that its keys and values take. So where each group is, how
large it is and who has to send what to whom is arithmetic that every rank does for itself.

A group stands at its last row, its leader: what stands there has all of the group behind it. `ready` says when a group may be
known: it is its last row for what is decided by position, the end of the window for what is decided by looking at a window.
Groups keep the order of their leaders, so a causal mask over groups is a causal mask over their numbers.

What this module does not do: choose (the policies), or move anything (`route`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from ringattn.arguments import instance, shown, text
from ringattn.callers import dense
from ringattn.errors import InputError

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
            dense(name, given)
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
        raise InputError(f"device={shown(device)}; give a device that is here, as 'cpu' ({shown(str(error))})") from None


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
