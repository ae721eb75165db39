"""Merges similar rows of a whole sequence by bipartite soft matching over ranks, exactly.

The directions of rows in set A travel by an attention schedule past those of set B (see `matching`); each row of A finds its
most similar row of B on any rank. Ranks then all-gather the results, and each selects the most similar pairs by itself. The
groups equal those of one process, ties included. Not causal: any row may influence any other.

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
from ringattn.merging.exchange import gather_all_rows
from ringattn.merging.matching import (
    NO_MATCH,
    A,
    B,
    BestMatch,
    EnergySum,
    Matching,
    alternating_sides,
    energy_sides,
    fixed_point,
    plan_for,
    random_sides,
    run_matchings,
    select_pairs,
)
from ringattn.merging.merge import Merge
from ringattn.merging.policy_inputs import MatchArgs, agree_on_arguments
from ringattn.schedule.catalog import NAMES
from ringattn.sequence.layout import Layout

NONCAUSAL_REASON = (
    "bipartite() decides from the whole sequence, so which rows merge depends on later rows; use "
    "similar(window=...), windows(...) or segments(...), or a mask that is not causal, such as full()"
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
    """Merges the most similar rows of the whole sequence; refused under a causal mask. Collective.

    Args:
        metric: (batch, rows, dim), this rank's rows of what is compared by cosine, such as keys averaged over heads.
        layout: which rows each rank holds: `plan.layout`.
        remove: the share of all rows that merge into others, up to 0.5. This or `threshold` must be given.
        threshold: cosine above which rows merge; with `remove` too, at most that share.
        protected: bool (batch, rows), this rank's rows that must not merge.
        scorer: "alternate", "energy" or "random", as in `similar`, with the whole sequence as one window.
        margin: for "energy": the cosine from which rows count as similar.
        seed: for "random".
        layer: for "random": the merging layer, so that layers draw differently.
        schedule: how rows of A meet rows of B: ring, token_ring, mesh or all_gather.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.

    Returns:
        The same merge on every rank, for any number of ranks and any schedule, ties included.

    Raises:
        InputError: an argument does not fit. Raised on every rank.
        MismatchError: ranks passed different arguments. Raised on every rank.
    """
    match_args = MatchArgs(remove, threshold, scorer, margin, seed, layer)

    def schedule_field() -> dict[str, object]:
        return {"by": one_of("schedule", schedule, NAMES, InputError)}

    transport, protected = agree_on_arguments(match_args, metric, layout, protected, group, schedule_field)
    (merge,) = match_over_ranks([metric], [protected], layout, match_args, schedule, transport)
    return merge


def match_over_ranks(
    metrics: Sequence[Tensor],
    protected: Sequence[Tensor],
    layout: Layout,
    match_args: MatchArgs,
    schedule: str,
    transport: Transport,
) -> list[Merge]:
    """`bipartite` on each rank that `transport` hosts."""
    directions = _ShardedDirections(layout, transport, [fixed_point(metric) for metric in metrics])
    free = gather_all_rows([~p for p in protected], layout, transport)
    sides = _sides(directions, free, match_args, schedule)
    matches = directions.match(BestMatch, [side == A for side in sides], [side == B for side in sides], schedule)
    merges = []
    for match, side in zip(matches, sides, strict=True):
        index = torch.arange(layout.length, device=side.device).expand_as(side)
        scores = match[..., 0].where(side == A, NO_MATCH)
        selected = select_pairs(scores, _pairs(side, match_args), match_args.threshold)
        merges.append(Merge.of(match[..., 1].where(selected, index), sees_all=NONCAUSAL_REASON))
    return merges


def _sides(directions: _ShardedDirections, free: Sequence[Tensor], match_args: MatchArgs, schedule: str) -> list[Tensor]:
    """(batch, seq_len) of `A`, `B` and `UNMATCHED`, on each hosted rank."""
    index = torch.arange(directions.layout.length, device=free[0].device)
    if match_args.scorer == "energy":
        all_rows = [torch.ones_like(f) for f in free]
        energies = directions.match(partial(EnergySum, margin=match_args.margin), all_rows, all_rows, schedule)
        pairs = torch.tensor([int(directions.layout.length * (match_args.remove or 0.5))], device=index.device)
        return [energy_sides(e[..., 0], f, pairs.expand(len(f))) for e, f in zip(energies, free, strict=True)]
    if match_args.scorer == "random":
        numbers = match_args.random_numbers(index, len(free[0]))
        return [random_sides(numbers, index.expand_as(f), f) for f in free]
    return [alternating_sides(index.expand_as(f), f) for f in free]


def _pairs(side: Tensor, match_args: MatchArgs) -> Tensor | None:
    if match_args.remove is None:
        return None
    return torch.tensor([int(side.shape[-1] * match_args.remove)], device=side.device)


RowFlags = Sequence[Tensor]  # bool (batch, seq_len), on each hosted rank


class _ShardedDirections:
    """The directions of all rows, sharded by `layout`, and matchings over them."""

    def __init__(self, layout: Layout, transport: Transport, directions: Sequence[Tensor]) -> None:
        self.layout, self.transport, self.directions = layout, transport, directions

    def match(self, make: Callable[..., Matching], rows: RowFlags, others: RowFlags, schedule: str) -> list[Tensor]:
        """Compares each of `rows` with all of `others`: int64 (batch, seq_len, state), on every rank.

        make: the kind of `Matching`. rows, others: bool (batch, seq_len).
        """
        row_tables, other_tables = ([_table(self.layout, flags) for flags in of_ranks] for of_ranks in (rows, others))
        row_counts, other_counts = ([table.shape[1] for table in tables[0]] for tables in (row_tables, other_tables))
        if not (sum(row_counts) and sum(other_counts)):
            state = (self.layout.length, 2)  # one of the two sets is empty
            return [own.new_full((len(own), *state), NO_MATCH, dtype=torch.int64) for own in self.directions]
        plan = plan_for(row_counts, other_counts, self.directions[0].shape[-1], schedule)
        matchings = []
        for rank, own, a, b in zip(self.transport.ranks, self.directions, row_tables, other_tables, strict=True):
            local = torch.full((self.layout.length + 1,), -1, device=own.device)
            resident = resident_positions(self.layout, rank).to(own.device)
            local[resident] = torch.arange(len(resident), device=own.device)
            operands = [own.gather(1, local[t[rank]].clamp(min=0).unsqueeze(-1).expand(-1, -1, own.shape[-1])) for t in (a, b)]
            matchings.append(make(plan, rank, *operands, b[rank]))
        results = run_matchings(matchings, plan, self.transport)
        parts = all_gather_rows([result.transpose(0, 1).contiguous() for result in results], row_counts, self.transport)
        gathered = []
        for tables, of_ranks in zip(row_tables, parts, strict=True):
            result = torch.cat(of_ranks).transpose(0, 1)
            positions = torch.cat(tables, dim=1)  # of the results, in the order in which they arrive; -1 is padding
            of_all = result.new_zeros(len(result), self.layout.length + 1, result.shape[-1])
            index = positions.where(positions >= 0, self.layout.length).unsqueeze(-1).expand_as(result)
            gathered.append(of_all.scatter(1, index, result)[:, :-1])
        return gathered


def _table(layout: Layout, flags: Tensor) -> list[Tensor]:
    """For each rank the positions it holds where `flags` is set, (batch, count), sorted, padded with -1."""
    tables = []
    for rank in range(layout.world):
        resident = resident_positions(layout, rank).to(flags.device).sort().values
        local = flags[:, resident]
        positions = resident.where(local, layout.length).sort(dim=1).values[:, : int(local.sum(1).amax())]
        tables.append(positions.where(positions < layout.length, -1))
    return tables
