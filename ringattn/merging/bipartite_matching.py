"""Similar rows of the whole sequence become one, wherever they are: bipartite soft matching over ranks, exactly.

Directions of half of the rows travel by a schedule of attention past those of the other half (see `matching`); each row of A
learns of its most similar row of B, wherever that is. Then ranks tell each other what they found, and each chooses the most
similar pairs by itself. The groups are those that one process finds, ties included. Not causal: any row may decide about any
other.

ToMe: Bolya et al. 2022, https://arxiv.org/abs/2210.09461; PiToMe: Tran et al. 2024, https://arxiv.org/abs/2405.16148.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ringattn._validation import one_of
from ringattn.comm.all_to_all import all_gather_rows
from ringattn.comm.process_group import Group
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.sharding import resident_positions
from ringattn.merging.exchange import told
from ringattn.merging.matching import (
    NONE,
    A,
    B,
    Best,
    Energy,
    Matching,
    alternate,
    by_chance,
    by_energy,
    chosen,
    fixed_point,
    plan_for,
    run_matching,
)
from ringattn.merging.merge import Merge
from ringattn.merging.policy_inputs import MatchArgs, asked
from ringattn.schedule.catalog import NAMES
from ringattn.sequence.layout import Layout

SEES_ALL = (
    "bipartite() decides with all of the sequence in view, so even which rows merge tells of later ones; use "
    "similar(window=...), windows(...) or segments(...), or a mask without an order such as full()"
)


def bipartite(
    metric: Tensor,
    layout: Layout,
    *,
    remove: float | None = None,
    threshold: float | None = None,
    protected: Tensor | None = None,
    scorer: Literal["alternate", "energy", "random"] = "alternate",
    margin: float = 0.5,
    seed: int = 0,
    layer: int = 0,
    schedule: str = "ring",
    group: Group | None = None,
) -> Merge:
    """In the whole sequence the most similar rows become one; refused under a causal mask. Collective.

    Args:
        metric: (batch, rows, dim), this rank's rows of what is compared by cosine.
        layout: which rows each rank has: `plan.layout`.
        remove: the share of all rows that merge into others, up to 0.5. This or `threshold` must be given.
        threshold: cosine above which rows merge; with `remove` too, at most so many.
        protected: bool (batch, rows), this rank's: rows that stay alone.
        scorer: "alternate", "energy" or "random", as in `similar`, where the whole sequence is one window.
        margin: for "energy": the cosine from which rows count as alike.
        seed: for "random".
        layer: for "random": which layer merges.
        schedule: by which rows meet: ring, token_ring, mesh or all_gather.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.

    Returns:
        The same merge on every rank, for any number of ranks and by any schedule, ties included.

    Raises:
        InputError: an argument does not fit. Raised on every rank.
        MismatchError: ranks came with different arguments. Raised on every rank.
    """
    ask = MatchArgs(remove, threshold, scorer, margin, seed, layer)

    def more() -> dict[str, object]:
        return {"by": one_of("schedule", schedule, NAMES, InputError)}

    transport, protected = asked(ask, metric, layout, protected, group, more)
    (found,) = over_ranks([metric], [protected], layout, ask, schedule, transport)
    return found


def over_ranks(
    metrics: Sequence[Tensor], protected: Sequence[Tensor], layout: Layout, ask: MatchArgs, schedule: str, transport: Transport
) -> list[Merge]:
    """`bipartite` on each rank that `transport` hosts."""
    there = _There(layout, transport, [fixed_point(metric) for metric in metrics])
    free = told([~p for p in protected], layout, transport)
    sides = _sides(there, free, ask, schedule)
    answers = there.ask(Best, [side == A for side in sides], [side == B for side in sides], schedule)
    found = []
    for answer, side in zip(answers, sides, strict=True):
        where = torch.arange(layout.length, device=side.device).expand_as(side)
        scores = answer[..., 0].where(side == A, NONE)
        taken = chosen(scores, _pairs(side, ask), ask.threshold)
        found.append(Merge.of(answer[..., 1].where(taken, where), sees_all=SEES_ALL))
    return found


def _sides(there: _There, free: Sequence[Tensor], ask: MatchArgs, schedule: str) -> list[Tensor]:
    """(batch, seq_len) of A, B and neither, on each hosted rank."""
    index = torch.arange(there.layout.length, device=free[0].device)
    if ask.scorer == "energy":
        everything = [torch.ones_like(f) for f in free]
        found = there.ask(partial(Energy, margin=ask.margin), everything, everything, schedule)
        pairs = torch.tensor([int(there.layout.length * (ask.remove or 0.5))], device=index.device)
        return [by_energy(e[..., 0], f, pairs.expand(len(f))) for e, f in zip(found, free, strict=True)]
    if ask.scorer == "random":
        numbers = ask.numbers(index, len(free[0]))
        return [by_chance(numbers, index.expand_as(f), f) for f in free]
    return [alternate(index.expand_as(f), f) for f in free]


def _pairs(like: Tensor, ask: MatchArgs) -> Tensor | None:
    return None if ask.remove is None else torch.tensor([int(like.shape[-1] * ask.remove)], device=like.device)


Sides = Sequence[Tensor]  # bool (batch, seq_len), on each hosted rank


class _There:
    """The whole sequence of directions where it lies, and questions to it."""

    def __init__(self, layout: Layout, transport: Transport, directions: Sequence[Tensor]) -> None:
        self.layout, self.transport, self.directions = layout, transport, directions

    def ask(self, work: Callable[..., Matching], rows: Sides, others: Sides, schedule: str) -> list[Tensor]:
        """For each of `rows`, bool (batch, seq_len), the answer of `others`: int64 (batch, seq_len, state), on every rank."""
        of_rows, of_others = ([_table(self.layout, where) for where in one] for one in (rows, others))
        counts, of_them = ([table.shape[1] for table in tables[0]] for tables in (of_rows, of_others))
        if not (sum(counts) and sum(of_them)):
            state = (self.layout.length, 2)  # nobody to ask, or nobody who answers
            return [own.new_full((len(own), *state), NONE, dtype=torch.int64) for own in self.directions]
        plan = plan_for(counts, of_them, self.directions[0].shape[-1], schedule)
        works = []
        for rank, own, a, b in zip(self.transport.ranks, self.directions, of_rows, of_others, strict=True):
            local = torch.full((self.layout.length + 1,), -1, device=own.device)
            mine = resident_positions(self.layout, rank).to(own.device)
            local[mine] = torch.arange(len(mine), device=own.device)
            picked = [own.gather(1, local[t[rank]].clamp(min=0).unsqueeze(-1).expand(-1, -1, own.shape[-1])) for t in (a, b)]
            works.append(work(plan, rank, *picked, b[rank]))
        answers = run_matching(works, plan, self.transport)
        parts = all_gather_rows([answer.transpose(0, 1).contiguous() for answer in answers], counts, self.transport)
        found = []
        for tables, of_ranks in zip(of_rows, parts, strict=True):
            answer = torch.cat(of_ranks).transpose(0, 1)
            places = torch.cat(tables, dim=1)  # of the answers, in whose order they come; -1 where there was none
            whole = answer.new_zeros(len(answer), self.layout.length + 1, answer.shape[-1])
            at = places.where(places >= 0, self.layout.length).unsqueeze(-1).expand_as(answer)
            found.append(whole.scatter(1, at, answer)[:, :-1])
        return found


def _table(layout: Layout, where: Tensor) -> list[Tensor]:
    """For each rank the positions it has of `where`, (batch, count), in order, filled up with -1 to the most in the batch."""
    tables = []
    for rank in range(layout.world):
        mine = resident_positions(layout, rank).to(where.device).sort().values
        here = where[:, mine]
        positions = mine.where(here, layout.length).sort(dim=1).values[:, : int(here.sum(1).amax())]
        tables.append(positions.where(positions < layout.length, -1))
    return tables
