"""Similar rows of a window become one: bipartite soft matching that looks no further than its window.

Windows need nothing of each other, so ranks decide by themselves and then tell each other; what a window holds may differ from
the next one in every way. It is the local merging of MergeDNA (https://arxiv.org/abs/2511.14806) and, for causal models, of
Götz et al. (https://arxiv.org/abs/2405.17951): what is decided by a window is known where the window ends, and not before.

A window that lies across ranks goes to the rank of its first row: its metric, not its channels. Windows that divide shards need
no more than the decisions, eight bytes a token.
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
from ringattn.merging.exchange import SlotExchange, owners, told, up
from ringattn.merging.matching import (
    NONE,
    A,
    B,
    alternate,
    best,
    by_chance,
    by_energy,
    chosen,
    energies,
    fixed_point,
    similarity,
)
from ringattn.merging.merge import MOST_ROWS, Merge, runs, starts
from ringattn.merging.policy_inputs import MatchArgs, asked
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
    """In every window the most similar rows become one; causal, known at the end of each window. Collective.

    Args:
        metric: (batch, rows, dim), this rank's rows of what is compared by cosine: keys averaged over heads, say.
        layout: which rows each rank has: `plan.layout`.
        window: rows in a window; the last may have fewer.
        remove: the share of a window's rows that merge into others, up to 0.5. This or `threshold` must be given.
        threshold: cosine above which rows merge; with `remove` too, at most so many.
        protected: bool (batch, rows), this rank's: rows that stay alone.
        scorer: "alternate": every other row may merge into one of the rest (ToMe); "energy": only rows that are like many
            others may (PiToMe, with `margin`); "random": into one of every two rows, drawn by (seed, layer, position).
        margin: for "energy": the cosine from which rows count as alike.
        seed: for "random".
        layer: for "random": which layer merges, so that layers draw differently.
        cu_seqlens: of packed documents: windows begin anew with each.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.

    Returns:
        The same merge on every rank and for any number of ranks, ties included.

    Raises:
        InputError: an argument does not fit. Raised on every rank.
        MismatchError: ranks came with different arguments. Raised on every rank.
    """
    ask = MatchArgs(remove, threshold, scorer, margin, seed, layer)
    cuts: tuple[int, ...] = ()

    def more() -> dict[str, object]:
        nonlocal cuts, window
        cuts, window = counts("cu_seqlens", cu_seqlens, InputError), min(as_int("window", window, InputError), MOST_ROWS)
        starts(layout.length, window, cuts)
        return {"window": window, "cu_seqlens": cuts}

    transport, protected = asked(ask, metric, layout, protected, group, more)
    (found,) = in_windows([metric], [protected], layout, window, cuts, ask, transport)
    return found


def in_windows(
    metrics: Sequence[Tensor],
    protected: Sequence[Tensor],
    layout: Layout,
    window: int,
    cu_seqlens: tuple[int, ...],
    ask: MatchArgs,
    transport: Transport,
) -> list[Merge]:
    """`similar` on each rank that `transport` hosts."""
    whole_windows = _whole_windows(layout, window, cu_seqlens)
    values = [torch.cat([fixed_point(m), p.int().unsqueeze(-1)], dim=-1) for m, p in zip(metrics, protected, strict=True)]
    batch = metrics[0].shape[0]
    if whole_windows is not layout:
        every = torch.arange(layout.length, device=metrics[0].device).expand(batch, -1)
        exchanges = [SlotExchange(every, layout, whole_windows, rank) for rank in transport.ranks]
        values = up(exchanges, values, transport)
    found = []
    for rank, own in zip(transport.ranks, values, strict=True):
        rows = resident_positions(whole_windows, rank).to(own.device)
        found.append(
            _decided(own[..., :-1], own[..., -1] > 0, rows, _table(whole_windows, rank, window, cu_seqlens).to(own.device), ask)
        )
    ends = runs(layout.length, window, cu_seqlens)[1].to(metrics[0].device)
    return [Merge.of(labels, decided=ends.expand(batch, -1)) for labels in told(found, whole_windows, transport)]


def _decided(metric: Tensor, protected: Tensor, positions: Tensor, table: Tensor, ask: MatchArgs) -> Tensor:
    """int64 (batch, rows): for each row the position of the one it merges into. table: (windows, width) local rows, or -1."""
    there, at = table >= 0, table.clamp(min=0)
    u, where = metric[:, at], positions[at]
    free = there & ~protected[:, at]
    index = torch.arange(table.shape[1], device=table.device).expand_as(free)
    pairs = None if ask.remove is None else (there.sum(-1).double() * ask.remove).floor().long().expand(free.shape[:-1])
    if ask.scorer == "energy":
        each = energies(similarity(u, u), ask.margin).masked_fill(~there.unsqueeze(-2), 0).sum(-1)
        side = by_energy(each, free, there.sum(-1).expand(free.shape[:-1]) // 2 if pairs is None else pairs)
    elif ask.scorer == "random":
        side = by_chance(ask.numbers(where, free.shape[0]), index, free)
    else:
        side = alternate(index, free)
    scores, targets = best(u, u, where.where(side == B, -1))
    taken = chosen(scores.where(side == A, NONE), pairs, ask.threshold)
    into = targets.where(taken, where)
    return positions.expand(metric.shape[:2]).scatter(1, at[there].expand(len(metric), -1), into[:, there])


@lru_cache(maxsize=32)
def _whole_windows(layout: Layout, window: int, cu_seqlens: tuple[int, ...]) -> Layout:
    """`layout` with every window on the rank of its first row; itself, if that is so already."""
    found = starts(layout.length, window, cu_seqlens)
    owner = owners(layout).rank
    first = torch.tensor(found)[:, 0].repeat_interleave(torch.tensor(found)[:, 1])
    if torch.equal(owner, owner[first]):
        return layout
    shards: list[list[Span]] = [[] for _ in range(layout.world)]
    for rank, (start, length) in zip(owner[torch.tensor(found)[:, 0]].tolist(), found, strict=True):
        shards[rank].append(Span(start, length))
    return Layout(f"{layout.name}, whole windows", tuple(map(joined, shards)))


@lru_cache(maxsize=32)
def _table(layout: Layout, rank: int, window: int, cu_seqlens: tuple[int, ...]) -> Tensor:
    """(windows, width): the local rows of each of this rank's windows, filled up with -1."""
    owner_of, found = owners(layout), torch.tensor(starts(layout.length, window, cu_seqlens))
    first, length = found[owner_of.rank[found[:, 0]] == rank].unbind(1)
    step = torch.arange(min(window, layout.length))
    rows = owner_of.row[(first[:, None] + step).clamp(max=layout.length - 1)]
    return rows.where(step < length[:, None], -1)
