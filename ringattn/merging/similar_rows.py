"""Merges similar rows within windows by bipartite soft matching; causal, since a merge is known at the end of its window.

Windows are independent, so each rank matches its own windows and the results are all-gathered. This is the local merging of
MergeDNA (https://arxiv.org/abs/2511.14806) and, for causal models, of Götz et al. (https://arxiv.org/abs/2405.17951).

The metric of a window that lies across ranks is sent to the rank of its first row; its channels are not. Windows that divide
shards communicate only the decisions, eight bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ringattn._validation import as_int, counts
from ringattn.comm.process_group import Group
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.sharding import resident_positions
from ringattn.merging.exchange import SlotExchange, gather_all_rows, owners, sum_to_slots
from ringattn.merging.matching import (
    NO_MATCH,
    A,
    B,
    alternating_sides,
    best_match,
    energies,
    energy_sides,
    fixed_point,
    random_sides,
    select_pairs,
    similarity,
)
from ringattn.merging.merge import MOST_ROWS, Merge, window_bounds, window_starts
from ringattn.merging.policy_inputs import MatchArgs, agree_on_arguments
from ringattn.sequence.layout import Layout, Span, joined


def similar(
    metric: Tensor,
    layout: Layout,
    *,
    window: int,
    remove: float | None = None,
    threshold: float | None = None,
    protected: Tensor | None = None,
    scorer: Literal["alternate", "energy", "random"] = "alternate",
    margin: float = 0.5,
    seed: int = 0,
    layer: int = 0,
    cu_seqlens: Sequence[int] = (),
    group: Group | None = None,
) -> Merge:
    """Merges the most similar rows of every window; causal, known at the end of each window. Collective.

    Args:
        metric: (batch, rows, dim), this rank's rows of what is compared by cosine, such as keys averaged over heads.
        layout: which rows each rank holds: `plan.layout`.
        window: rows in a window; the last may have fewer.
        remove: the share of a window's rows that merge into others, up to 0.5. This or `threshold` must be given.
        threshold: cosine above which rows merge; with `remove` too, at most that share.
        protected: bool (batch, rows), this rank's rows that must not merge.
        scorer: "alternate": every other row may merge into one of the rest (ToMe); "energy": only rows that are similar to many
            others may (PiToMe, with `margin`); "random": into one of every two rows, drawn by (seed, layer, position).
        margin: for "energy": the cosine from which rows count as similar.
        seed: for "random".
        layer: for "random": the merging layer, so that layers draw differently.
        cu_seqlens: boundaries of packed documents; windows restart at each.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.

    Returns:
        The same merge on every rank and for any number of ranks, ties included.

    Raises:
        InputError: an argument does not fit. Raised on every rank.
        MismatchError: ranks passed different arguments. Raised on every rank.
    """
    match_args = MatchArgs(remove, threshold, scorer, margin, seed, layer)
    cuts: tuple[int, ...] = ()

    def window_fields() -> dict[str, object]:
        nonlocal cuts, window
        cuts, window = counts("cu_seqlens", cu_seqlens, InputError), min(as_int("window", window, InputError), MOST_ROWS)
        window_starts(layout.length, window, cuts)
        return {"window": window, "cu_seqlens": cuts}

    transport, protected = agree_on_arguments(match_args, metric, layout, protected, group, window_fields)
    (merge,) = match_in_windows([metric], [protected], layout, window, cuts, match_args, transport)
    return merge


def match_in_windows(
    metrics: Sequence[Tensor],
    protected: Sequence[Tensor],
    layout: Layout,
    window: int,
    cu_seqlens: tuple[int, ...],
    match_args: MatchArgs,
    transport: Transport,
) -> list[Merge]:
    """`similar` on each rank that `transport` hosts."""
    window_layout = _window_layout(layout, window, cu_seqlens)
    values = [torch.cat([fixed_point(m), p.int().unsqueeze(-1)], dim=-1) for m, p in zip(metrics, protected, strict=True)]
    batch = metrics[0].shape[0]
    if window_layout is not layout:
        positions = torch.arange(layout.length, device=metrics[0].device).expand(batch, -1)
        exchanges = [SlotExchange(positions, layout, window_layout, rank) for rank in transport.ranks]
        values = sum_to_slots(exchanges, values, transport)
    labels = []
    for rank, own in zip(transport.ranks, values, strict=True):
        rows = resident_positions(window_layout, rank).to(own.device)
        labels.append(
            _match_windows(
                own[..., :-1],
                own[..., -1] > 0,
                rows,
                _table(window_layout, rank, window, cu_seqlens).to(own.device),
                match_args,
            )
        )
    ends = window_bounds(layout.length, window, cu_seqlens)[1].to(metrics[0].device)
    return [Merge.of(of_all, decided=ends.expand(batch, -1)) for of_all in gather_all_rows(labels, window_layout, transport)]


def _match_windows(metric: Tensor, protected: Tensor, positions: Tensor, table: Tensor, match_args: MatchArgs) -> Tensor:
    """Matches the rows of each window: int64 (batch, rows), for each row the position of the row it merges into.

    table: (windows, width), local rows, or -1.
    """
    valid, local_rows = table >= 0, table.clamp(min=0)
    directions, row_positions = metric[:, local_rows], positions[local_rows]
    free = valid & ~protected[:, local_rows]
    index = torch.arange(table.shape[1], device=table.device).expand_as(free)
    pairs = (
        None
        if match_args.remove is None
        else (valid.sum(-1).double() * match_args.remove).floor().long().expand(free.shape[:-1])
    )
    if match_args.scorer == "energy":
        energy = energies(similarity(directions, directions), match_args.margin).masked_fill(~valid.unsqueeze(-2), 0).sum(-1)
        sides = energy_sides(energy, free, valid.sum(-1).expand(free.shape[:-1]) // 2 if pairs is None else pairs)
    elif match_args.scorer == "random":
        sides = random_sides(match_args.random_numbers(row_positions, free.shape[0]), index, free)
    else:
        sides = alternating_sides(index, free)
    scores, targets = best_match(directions, directions, row_positions.where(sides == B, -1))
    selected = select_pairs(scores.where(sides == A, NO_MATCH), pairs, match_args.threshold)
    into = targets.where(selected, row_positions)
    return positions.expand(metric.shape[:2]).scatter(1, local_rows[valid].expand(len(metric), -1), into[:, valid])


@lru_cache(maxsize=32)
def _window_layout(layout: Layout, window: int, cu_seqlens: tuple[int, ...]) -> Layout:
    """`layout` with every window on the rank of its first row; `layout` itself where that holds already."""
    spans = window_starts(layout.length, window, cu_seqlens)
    owner = owners(layout).rank
    starts, lengths = torch.tensor(spans).unbind(1)
    first = starts.repeat_interleave(lengths)
    if torch.equal(owner, owner[first]):
        return layout
    shards: list[list[Span]] = [[] for _ in range(layout.world)]
    for rank, (start, length) in zip(owner[starts].tolist(), spans, strict=True):
        shards[rank].append(Span(start, length))
    return Layout(f"{layout.name}, whole windows", tuple(map(joined, shards)))


@lru_cache(maxsize=32)
def _table(layout: Layout, rank: int, window: int, cu_seqlens: tuple[int, ...]) -> Tensor:
    """(windows, width): the local rows of each of this rank's windows, padded with -1."""
    owner_map, spans = owners(layout), torch.tensor(window_starts(layout.length, window, cu_seqlens))
    first, length = spans[owner_map.rank[spans[:, 0]] == rank].unbind(1)
    offsets = torch.arange(min(window, layout.length))
    rows = owner_map.row[(first[:, None] + offsets).clamp(max=layout.length - 1)]
    return rows.where(offsets < length[:, None], -1)
