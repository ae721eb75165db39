"""Assigns merged groups to slots on ranks, turns the mask over rows into one over slots, and prices the alternatives.

A plan needs the number of rows of every rank, so slots may outnumber groups: the sequences of a batch have different numbers of
groups, and where counts depend on data they are rounded up to `bucket`, so that few different plans occur. An empty slot has
size 0: its key bias is -inf, so no query attends to it.

    keep_in_place    a group stays on the rank of its last row; counts may differ from rank to rank
    spread_evenly    slots have a layout of their own; groups move, and counts are equal

After merging by content ranks hold different numbers of groups, and all wait for the rank with most. Spreading them evenly
costs an exchange before and after the layers in each pass, and saves time in every layer that runs on the groups.
`choose_placement` plans and prices both and takes the cheaper; the plan's notes name both times. Where no rank has more than
`IMBALANCE_THRESHOLD` times the mean, groups stay and nothing is priced. No communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn._validation import count, number, short_repr
from ringattn.errors import InputError
from ringattn.merging.exchange import owners
from ringattn.merging.merge import DELETED, Merge
from ringattn.plan.plan import Plan
from ringattn.planner import make_plan
from ringattn.planner.cost import ITEMSIZE, price, transfer_seconds
from ringattn.planner.request import topology_for
from ringattn.planner.topology import Topology
from ringattn.sequence.layout import LAYOUTS, Layout, Span, joined
from ringattn.sequence.mask import END, Band, Mask, Rect

OVER = " over groups"  # appended to the name of a mask


@dataclass(frozen=True, eq=False)
class Placement:
    """Where groups lie.

    slots[b, n]: the slot of group n of sequence b. leaders[b, s]: the last row of the group in slot s, or -1.
    """

    layout: Layout
    slots: Tensor
    leaders: Tensor

    def slots_of(self, groups: Tensor) -> Tensor:
        """The slots of groups, int64 (batch, ...); -1 stays -1."""
        slots = self.slots.gather(1, groups.clamp(min=0).flatten(1)).view_as(groups)
        return slots.where(groups >= 0, DELETED)


def keep_in_place(merge: Merge, layout: Layout, bucket: int = 1, edges: Sequence[int] = ()) -> Placement:
    """Places every group on the rank of its last row. layout: of the rows, in runs (stride 1).

    edges: rows at which the mask changes; groups before and after an edge have separate slots in all sequences of the batch.
    """
    if is_striped(layout):
        raise InputError(
            f"layout {layout.name!r} holds every {layout.world}th row, and groups that stay keep their order only where rows "
            'lie in runs; use a contiguous or zigzag layout, or layout="even"'
        )
    owners = {span.start: rank for rank, shard in enumerate(layout.shards) for span in shard if span.length}
    runs = _slot_runs(merge, {*owners, *edges}, bucket)
    shards: list[list[Span]] = [[] for _ in range(layout.world)]
    rank = 0
    for start, capacity, offset in zip(runs.starts, runs.capacities, runs.offsets, strict=True):
        rank = owners.get(start, rank)
        shards[rank].append(Span(offset, capacity))
    merged = Layout(f"{layout.name}, merged", tuple(joined(span for span in shard if span.length) for shard in shards))
    return _placement(merge, merged, runs)


def spread_evenly(merge: Merge, layout: Layout, bucket: int = 1, edges: Sequence[int] = ()) -> Placement:
    """Places equally many groups on every rank, in the named layout of the rows, or contiguous where that has no name."""
    runs = _slot_runs(merge, {0, *edges}, bucket)
    name = layout.name if layout.name in LAYOUTS else "contiguous"
    return _placement(merge, LAYOUTS[name](sum(runs.capacities), layout.world), runs)


def is_striped(layout: Layout) -> bool:
    """Whether a rank holds rows with a stride."""
    return any(span.stride > 1 and span.length > 1 for shard in layout.shards for span in shard)


class _SlotRuns(NamedTuple):
    """Runs of rows and their slots: the groups of run n lie in capacities[n] slots from offsets[n] on, in all sequences."""

    starts: list[int]
    capacities: list[int]
    offsets: list[int]
    slots: Tensor  # int64 (batch, seq_len), valid at leaders only


def _slot_runs(merge: Merge, starts: Iterable[int], bucket: int) -> _SlotRuns:
    bounds = [*sorted({0, *(start for start in starts if 0 <= start < merge.seq_len)}), merge.seq_len]
    before = pad(merge.leads.cumsum(1), (1, 0))  # groups before each row
    ends = torch.tensor(bounds, device=before.device)
    most = before[:, ends].diff(dim=1).amax(0).tolist()
    least = bucket > 1  # with buckets at least one, so that 0 groups and 1 have the same plan
    capacities = [min(-(-max(n, least) // bucket) * bucket, b - a) for n, (a, b) in zip(most, pairwise(bounds), strict=True)]
    capacities[0] += not any(capacities)  # a plan needs one slot, also where every row is deleted
    offsets = [0, *accumulate(capacities)][:-1]
    run = torch.bucketize(torch.arange(merge.seq_len, device=before.device), ends[1:], right=True)  # of each row
    slots = torch.tensor(offsets, device=before.device)[run] + before[:, :-1] - before[:, ends[run]]
    return _SlotRuns(bounds[:-1], capacities, offsets, slots)


def _placement(merge: Merge, layout: Layout, runs: _SlotRuns) -> Placement:
    batch, most, capacity, slots = merge.batch, max(1, *merge.counts), sum(runs.capacities), runs.slots
    index = torch.arange(merge.seq_len, device=slots.device).expand(batch, -1)
    numbers, leads = merge.numbers.where(merge.leads, most), merge.leads  # others write to a column that is dropped
    of_groups = torch.zeros(batch, most + 1, dtype=torch.int64, device=slots.device).scatter(1, numbers, slots)
    leaders = torch.full((batch, capacity + 1), DELETED, device=slots.device)
    leaders = leaders.scatter(1, slots.where(leads, capacity), index)[:, :capacity]
    return Placement(layout, of_groups[:, :most], leaders)


def mask_edges(mask: Mask, seq_len: int) -> tuple[int, ...]:
    """The positions within a sequence at which `mask` changes."""
    return tuple(sorted({p for r in mask.rects for p in r[:4] if 0 < p < seq_len}))


def mask_over_slots(mask: Mask, merge: Merge, placement: Placement) -> Mask:
    """Converts a mask over rows to one over slots: a group sees what its last row sees.

    placement: made with the `mask_edges` of the mask. Raises `InputError` for a window mask over groups whose last rows are
    at unequal distances.
    """
    capacity, inner = placement.layout.length, mask_edges(mask, merge.seq_len)
    before = pad(merge.leads.cumsum(1), (1, 0))[:, torch.tensor(inner, device=merge.into.device, dtype=torch.int64)]
    slots = pad(placement.slots, (0, 1)).gather(1, before)  # of the first group at or after the edge
    counts = torch.tensor(merge.counts, device=slots.device)[:, None]
    first: dict[int, int] = dict(zip(inner, slots.where(before < counts, capacity).amin(0).tolist(), strict=True))

    def slot(position: int) -> int:
        return first.get(position, 0 if position <= 0 else END if position >= END else capacity)

    rects = (
        Rect(slot(r.q_start), slot(r.q_stop), slot(r.k_start), slot(r.k_stop), _band(r.band, mask, placement))
        for r in mask.rects
    )
    visible = tuple(r for r in rects if r.q_start < r.q_stop and r.k_start < r.k_stop)
    return Mask(f"{mask.name.removesuffix(OVER)}{OVER}", visible, capacity if mask.length is not None else None)


def _band(band: Band, mask: Mask, placement: Placement) -> Band:
    if band.left <= -END and (band.right == 0 or band.right >= END):
        return band
    leaders = placement.leaders
    steps = leaders.diff(dim=1).unique().tolist() or [1]
    if len(steps) > 1 or steps[0] < 1:
        raise InputError(
            f"mask {mask}: a window counts rows, and the last rows of these groups are at unequal distances; merge with "
            "fixed windows whose factor divides the sequence and without protected rows, or use a mask without a window"
        )
    left = band.left if band.left <= -END else -(-band.left // steps[0])
    return Band(left, band.right if band.right >= END else band.right // steps[0])


def is_causal(mask: Mask) -> bool:
    """Whether some query may not see later keys; then no group may be seen before it is ready."""
    return any(rect.band.right < END for rect in mask.rects)


def crosses_documents(merge: Merge, mask: Mask) -> int | None:
    """The first row that lies in another document than the last row of its group, or None. Bands are ignored."""
    into = merge.into.clamp(min=0)
    index = torch.arange(merge.seq_len, device=into.device).repeat(merge.batch, 1)
    if mask.bounds:
        ends = torch.tensor(mask.bounds[1:], device=index.device)
        same_document = torch.bucketize(index, ends, right=True) == torch.bucketize(into, ends, right=True)
    else:
        same_document = torch.zeros_like(index, dtype=torch.bool)
        for r in mask.rects:
            same_document |= (into >= r.q_start) & (into < r.q_stop) & (index >= r.k_start) & (index < r.k_stop)
    return _first(~same_document & (merge.into != index) & (merge.into >= 0))


def seen_before_ready(merge: Merge, mask: Mask) -> int | None:
    """The first leader whose group some row sees before it is ready, as rows of a prefix do, or None."""
    index = torch.arange(merge.seq_len, device=merge.into.device)
    early = torch.zeros_like(merge.leads)
    for r in mask.rects if is_causal(mask) else ():
        ahead, unlimited = r.band.right > 0, r.band.right >= END and r.k_stop >= merge.seq_len
        if ahead and not unlimited:
            known_by = r.k_stop if r.band.right >= END else index + 1
            early |= (index >= r.k_start) & (index < r.k_stop) & (merge.ready >= known_by)
    return _first(early & merge.leads)


def _first(flags: Tensor) -> int | None:
    rows = flags.any(0).nonzero()
    return int(rows[0]) if len(rows) else None


def is_visible(mask: Mask, rows: Tensor, keys: Tensor) -> Tensor:
    """Whether `mask` keeps each (row, key) of positions: bool, the shape of `rows`."""
    if mask.bounds:  # one rectangle for each document, possibly thousands
        ends = torch.tensor(mask.bounds[1:], device=rows.device)
        rows, keys = rows.contiguous(), keys.contiguous()
        document = torch.bucketize(rows, ends, right=True)
        left, right = (
            torch.tensor(side, device=rows.device)[document] for side in zip(*(r.band for r in mask.rects), strict=True)
        )
        same_document = torch.bucketize(keys, ends, right=True) == document
        return same_document & (keys - rows >= left) & (keys - rows <= right)
    visible = torch.zeros_like(rows, dtype=torch.bool)
    for r in mask.rects:
        inside = (rows >= r.q_start) & (rows < r.q_stop) & (keys >= r.k_start) & (keys < r.k_stop)
        visible |= inside & (keys - rows >= r.band.left) & (keys - rows <= r.band.right)
    return visible


IMBALANCE_THRESHOLD = 1.1  # times the mean


@dataclass(frozen=True)
class LayerCost:
    """The cost of the layers that run on groups, for `choose_placement`.

    layers: number of layers that run on the groups.    batch: sequences in a step.
    dim: channels of the merged tensor, for its bytes; by default heads * head_dim of the plan.
    row_flops: floating-point operations of a layer for each row besides attention, forward (projections, MLP).
    """

    layers: int = 1
    batch: int = 1
    dim: int | None = None
    row_flops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "batch", *(["dim"] if self.dim is not None else [])):
            count(name, getattr(self, name), InputError, least=int(name != "layers"))
        number("row_flops", self.row_flops, InputError, least=0)


def choose_placement(
    merge: Merge, plan: Plan, layout: str, bucket: int, cost: LayerCost, choices: Mapping[str, Any]
) -> tuple[Plan, Placement]:
    """Chooses where groups lie; returns the plan over groups and their placement."""
    if not isinstance(layout, str) or layout not in ("auto", "stay", "even"):
        raise InputError(f"layout={short_repr(layout)}; choose auto, stay or even")
    inner = mask_edges(plan.mask, plan.seq_len) if merge.batch > 1 else ()  # a single sequence is aligned with itself
    if layout == "even" or (layout == "auto" and is_striped(plan.layout)):
        return _plan(merge, plan, spread_evenly(merge, plan.layout, bucket, inner), choices)
    kept_plan, placement = _plan(merge, plan, keep_in_place(merge, plan.layout, bucket, inner), choices)
    rows = [kept_plan.rows(rank) for rank in range(plan.world)]
    if layout == "stay" or max(rows) * plan.world <= IMBALANCE_THRESHOLD * sum(rows):
        return kept_plan, placement
    spread_plan, spread_placement = _plan(merge, plan, spread_evenly(merge, plan.layout, bucket, inner), choices)
    topology = topology_for(choices.get("topology"), plan.world)
    passes = (False, True)[: 1 + choices.get("training", True)]
    kept_seconds, spread_seconds = (_layer_seconds(choice, topology, cost, passes) for choice in (kept_plan, spread_plan))
    kept_exchange, spread_exchange = (
        _exchange_seconds(merge, plan, where, topology, cost) for where in (placement, spread_placement)
    )
    exchange_seconds = 2 * len(passes) * (spread_exchange - kept_exchange)
    better = spread_seconds + exchange_seconds < kept_seconds
    note = (
        f"groups {min(rows)} to {max(rows)} a rank; spread evenly {cost.layers} layers take {spread_seconds * 1e3:.3g} instead "
        f"of {kept_seconds * 1e3:.3g} ms, and moving them {exchange_seconds * 1e3:.3g} ms more: "
        f"{'spread evenly' if better else 'kept in place'}"
    )
    chosen = (spread_plan, spread_placement) if better else (kept_plan, placement)
    return replace(chosen[0], notes="\n".join(filter(None, (chosen[0].notes, note)))), chosen[1]


def _plan(merge: Merge, plan: Plan, placement: Placement, choices: Mapping[str, Any]) -> tuple[Plan, Placement]:
    inherited: dict[str, Any] = dict(
        heads=plan.heads, kv_heads=plan.kv_heads, head_dim=plan.head_dim, dtype=plan.dtype, kernel=plan.kernel, world=plan.world
    )
    mask = mask_over_slots(plan.mask, merge, placement)
    short_plan = make_plan(placement.layout.length, **inherited, mask=mask, layout=placement.layout, **choices)
    return short_plan, placement


def _layer_seconds(plan: Plan, topology: Topology, cost: LayerCost, passes: Sequence[bool]) -> float:
    """Seconds of all layers in all passes (passes: whether each is the backward pass)."""
    rows = max(plan.rows(rank) for rank in range(plan.world)) * cost.batch
    other_seconds = rows * cost.row_flops / topology.flops
    return cost.layers * sum(
        price(plan, topology, batch=cost.batch, backward=backward).seconds + other_seconds * (1 + backward)
        for backward in passes
    )


def _exchange_seconds(merge: Merge, plan: Plan, placement: Placement, topology: Topology, cost: LayerCost) -> float:
    """Seconds of communication to merge once; unmerging and the backward passes of both move the same rows."""
    rows, slots = owners(plan.layout), owners(placement.layout)
    links: Counter[tuple[int, int]] = Counter()
    for slot in placement.slots_of(merge.numbers).cpu():
        used = slot >= 0
        link = rows.rank[used] * plan.world + slots.rank[slot[used]]
        sends = (link * placement.layout.length + slot[used]).unique() // placement.layout.length  # a slot once from each rank
        for pair, rows_sent in zip(*(t.tolist() for t in sends.unique(return_counts=True)), strict=True):
            links[divmod(pair, plan.world)] += rows_sent
    width = (cost.dim or plan.heads * plan.head_dim) * ITEMSIZE[plan.dtype]
    sent = {(src, dst): count * width for (src, dst), count in links.items() if src != dst}
    return transfer_seconds(sent, topology)
