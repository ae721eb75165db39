"""Where groups lie on ranks: each in a slot, slots in order, and a layout says which rank has which.

A plan needs to know how many rows every rank has, so slots may outnumber groups: sequences of a batch have different numbers of
groups, and where counts depend on the data they are rounded up to `bucket`, so that few different plans ever occur. An empty
slot has size 0: its key bias is -inf and nobody sees it.

    stay    a group stays on the rank of its last row; counts may then differ from rank to rank
    even    slots are dealt out anew in a layout of their own; groups move, ranks have as many

The mask over rows becomes one over slots here: by the position at which each group stands. No communication.

Whether groups stay where they are or are dealt out evenly: both are planned and priced, and the cheaper one is taken.

After merging by content ranks hold different numbers of groups, and all wait for the one with most. Dealing them out anew costs
sending what moves to another rank, and back, in each pass; it gains in every layer that runs on the groups. Both are in the
plan's description. Where no rank has more than `WORTH_A_LOOK` of the mean, groups stay and nothing is reckoned.
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

OVER = " over groups"  # behind the name of a mask


@dataclass(frozen=True, eq=False)
class Placement:
    """`slots[b, n]`: the slot of group n of sequence b. `leaders[b, s]`: the row at which the group in slot s stands, or -1."""

    layout: Layout
    slots: Tensor
    leaders: Tensor

    def of(self, groups: Tensor) -> Tensor:
        """The slots of groups, int64 (batch, ...); -1 stays -1."""
        found = self.slots.gather(1, groups.clamp(min=0).flatten(1)).view_as(groups)
        return found.where(groups >= 0, DELETED)


def stay(merge: Merge, layout: Layout, bucket: int = 1, edges: Sequence[int] = ()) -> Placement:
    """Every group on the rank where its last row is. `layout`: of the rows; it must hold them in runs (stride 1).

    edges: rows at which a mask changes: what stands before and behind lies apart in all sequences of the batch.
    """
    if in_stripes(layout):
        raise InputError(
            f"layout {layout.name!r} holds every {layout.world}th row, and groups that stay keep their order only where rows "
            'lie in runs; use a contiguous or zigzag layout, or layout="even"'
        )
    owners = {span.start: rank for rank, shard in enumerate(layout.shards) for span in shard if span.length}
    runs = _runs(merge, {*owners, *edges}, bucket)
    shards: list[list[Span]] = [[] for _ in range(layout.world)]
    rank = 0
    for start, capacity, offset in zip(runs.starts, runs.rooms, runs.offsets, strict=True):
        rank = owners.get(start, rank)
        shards[rank].append(Span(offset, capacity))
    held = Layout(f"{layout.name}, merged", tuple(joined(span for span in shard if span.length) for shard in shards))
    return _placement(merge, held, runs)


def even(merge: Merge, layout: Layout, bucket: int = 1, edges: Sequence[int] = ()) -> Placement:
    """As many groups on every rank, in a layout like that of the rows (contiguous, if that was none of the named ones)."""
    runs = _runs(merge, {0, *edges}, bucket)
    name = layout.name if layout.name in LAYOUTS else "contiguous"
    return _placement(merge, LAYOUTS[name](sum(runs.rooms), layout.world), runs)


def in_stripes(layout: Layout) -> bool:
    """Whether some rank holds rows that are not next to each other, one by one."""
    return any(span.stride > 1 and span.length > 1 for shard in layout.shards for span in shard)


class _Runs(NamedTuple):
    """Rows from one start to the next have their groups in `rooms` slots from `offsets` on, in every sequence of the batch."""

    starts: list[int]
    rooms: list[int]
    offsets: list[int]
    slots: Tensor  # int64 (batch, seq_len), right at the rows where groups stand


def _runs(merge: Merge, starts: Iterable[int], bucket: int) -> _Runs:
    bounds = [*sorted({0, *(start for start in starts if 0 <= start < merge.seq_len)}), merge.seq_len]
    before = pad(merge.leads.cumsum(1), (1, 0))  # groups before each row
    ends = torch.tensor(bounds, device=before.device)
    most = before[:, ends].diff(dim=1).amax(0).tolist()
    least = bucket > 1  # where counts are rounded up, to one bucket at least: also 0 groups today and 1 tomorrow are one plan
    rooms = [min(-(-max(n, least) // bucket) * bucket, b - a) for n, (a, b) in zip(most, pairwise(bounds), strict=True)]
    rooms[0] += not any(rooms)  # with every row deleted there still has to be one slot
    offsets = [0, *accumulate(rooms)][:-1]
    run = torch.bucketize(torch.arange(merge.seq_len, device=before.device), ends[1:], right=True)  # of each row
    slots = torch.tensor(offsets, device=before.device)[run] + before[:, :-1] - before[:, ends[run]]
    return _Runs(bounds[:-1], rooms, offsets, slots)


def _placement(merge: Merge, layout: Layout, runs: _Runs) -> Placement:
    batch, most, capacity, slots = merge.batch, max(1, *merge.counts), sum(runs.rooms), runs.slots
    where = torch.arange(merge.seq_len, device=slots.device).expand(batch, -1)
    numbers, leads = merge.numbers.where(merge.leads, most), merge.leads  # others write where nobody reads
    of_groups = torch.zeros(batch, most + 1, dtype=torch.int64, device=slots.device).scatter(1, numbers, slots)
    leaders = torch.full((batch, capacity + 1), DELETED, device=slots.device)
    leaders = leaders.scatter(1, slots.where(leads, capacity), where)[:, :capacity]
    return Placement(layout, of_groups[:, :most], leaders)


def edges(mask: Mask, seq_len: int) -> tuple[int, ...]:
    """The rows within a sequence at which `mask` changes."""
    return tuple(sorted({p for r in mask.rects for p in r[:4] if 0 < p < seq_len}))


def over_slots(mask: Mask, merge: Merge, placement: Placement) -> Mask:
    """`mask`, which is over rows, as one over slots: a group sees what its last row sees. `placement` knows of its `edges`.

    Raises `InputError` when it cannot be said in slots: the mask is a window and groups stand at unequal distances.
    """
    capacity, inner = placement.layout.length, edges(mask, merge.seq_len)
    before = pad(merge.leads.cumsum(1), (1, 0))[:, torch.tensor(inner, device=merge.into.device, dtype=torch.int64)]
    slots = pad(placement.slots, (0, 1)).gather(1, before)  # of the first group there or behind
    counts = torch.tensor(merge.counts, device=slots.device)[:, None]
    first: dict[int, int] = dict(zip(inner, slots.where(before < counts, capacity).amin(0).tolist(), strict=True))

    def slot(position: int) -> int:
        return first.get(position, 0 if position <= 0 else END if position >= END else capacity)

    rects = (
        Rect(slot(r.q_start), slot(r.q_stop), slot(r.k_start), slot(r.k_stop), _band(r.band, mask, placement))
        for r in mask.rects
    )
    kept = tuple(r for r in rects if r.q_start < r.q_stop and r.k_start < r.k_stop)
    return Mask(f"{mask.name.removesuffix(OVER)}{OVER}", kept, capacity if mask.length is not None else None)


def _band(band: Band, mask: Mask, placement: Placement) -> Band:
    if band.left <= -END and (band.right == 0 or band.right >= END):
        return band
    leaders = placement.leaders
    steps = leaders.diff(dim=1).unique().tolist() or [1]
    if len(steps) > 1 or steps[0] < 1:
        raise InputError(
            f"mask {mask}: a window counts rows, and these groups stand at unequal distances; merge with fixed windows whose "
            "factor divides the sequence and nothing protected, or use a mask without a window"
        )
    left = band.left if band.left <= -END else -(-band.left // steps[0])
    return Band(left, band.right if band.right >= END else band.right // steps[0])


def is_causal(mask: Mask) -> bool:
    """Whether some query may not see what comes after it: then no group may be known before it is ready."""
    return any(rect.band.right < END for rect in mask.rects)


def crosses(merge: Merge, mask: Mask) -> int | None:
    """A row that the last row of its group does not see, bands aside: of another document. None if there is none."""
    into = merge.into.clamp(min=0)
    where = torch.arange(merge.seq_len, device=into.device).repeat(merge.batch, 1)
    if mask.bounds:
        ends = torch.tensor(mask.bounds[1:], device=where.device)
        together = torch.bucketize(where, ends, right=True) == torch.bucketize(into, ends, right=True)
    else:
        together = torch.zeros_like(where, dtype=torch.bool)
        for r in mask.rects:
            together |= (into >= r.q_start) & (into < r.q_stop) & (where >= r.k_start) & (where < r.k_stop)
    return _first(~together & (merge.into != where) & (merge.into >= 0))


def untimely(merge: Merge, mask: Mask) -> int | None:
    """Where a group stands that some row sees before it is ready, as rows of a prefix see all of it. None if there is none."""
    where = torch.arange(merge.seq_len, device=merge.into.device)
    early = torch.zeros_like(merge.leads)
    for r in mask.rects if is_causal(mask) else ():
        ahead, all_there_is = r.band.right > 0, r.band.right >= END and r.k_stop >= merge.seq_len
        if ahead and not all_there_is:
            known_by = r.k_stop if r.band.right >= END else where + 1
            early |= (where >= r.k_start) & (where < r.k_stop) & (merge.ready >= known_by)
    return _first(early & merge.leads)


def _first(found: Tensor) -> int | None:
    rows = found.any(0).nonzero()
    return int(rows[0]) if len(rows) else None


def seen(mask: Mask, rows: Tensor, keys: Tensor) -> Tensor:
    """Whether `mask` keeps each (row, key) of positions: bool, the shape of `rows`."""
    if mask.bounds:  # one rectangle to a document: perhaps thousands
        ends = torch.tensor(mask.bounds[1:], device=rows.device)
        rows, keys = rows.contiguous(), keys.contiguous()
        document = torch.bucketize(rows, ends, right=True)
        left, right = (
            torch.tensor(side, device=rows.device)[document] for side in zip(*(r.band for r in mask.rects), strict=True)
        )
        together = torch.bucketize(keys, ends, right=True) == document
        return together & (keys - rows >= left) & (keys - rows <= right)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    for r in mask.rects:
        inside = (rows >= r.q_start) & (rows < r.q_stop) & (keys >= r.k_start) & (keys < r.k_stop)
        kept |= inside & (keys - rows >= r.band.left) & (keys - rows <= r.band.right)
    return kept


WORTH_A_LOOK = 1.1  # times the mean


@dataclass(frozen=True)
class LayerCost:
    """What merging is reckoned with, beside attention.

    layers: that run on the groups.                     batch: sequences in a step.
    dim: channels of what is merged, for its bytes; by default heads * head_dim of the plan.
    row_flops: floating-point operations that a layer needs for each row beside attention, forward (projections, MLP).
    """

    layers: int = 1
    batch: int = 1
    dim: int | None = None
    row_flops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "batch", *(["dim"] if self.dim is not None else [])):
            count(name, getattr(self, name), InputError, least=int(name != "layers"))
        number("row_flops", self.row_flops, InputError, least=0)


def placed(
    merge: Merge, plan: Plan, layout: str, bucket: int, pay: LayerCost, choices: Mapping[str, Any]
) -> tuple[Plan, Placement]:
    """The plan over groups and where they lie."""
    if not isinstance(layout, str) or layout not in ("auto", "stay", "even"):
        raise InputError(f"layout={short_repr(layout)}; choose auto, stay or even")
    inner = edges(plan.mask, plan.seq_len) if merge.batch > 1 else ()  # one sequence is in line with itself
    if layout == "even" or (layout == "auto" and in_stripes(plan.layout)):
        return _plan(merge, plan, even(merge, plan.layout, bucket, inner), choices)
    staying, placement = _plan(merge, plan, stay(merge, plan.layout, bucket, inner), choices)
    rows = [staying.rows(rank) for rank in range(plan.world)]
    if layout == "stay" or max(rows) * plan.world <= WORTH_A_LOOK * sum(rows):
        return staying, placement
    dealt, elsewhere = _plan(merge, plan, even(merge, plan.layout, bucket, inner), choices)
    topology, passes = topology_for(choices.get("topology"), plan.world), (False, True)[: 1 + choices.get("training", True)]
    stays, moves = (_layers(one, topology, pay, passes) for one in (staying, dealt))
    way = 2 * len(passes) * (_moving(merge, plan, elsewhere, topology, pay) - _moving(merge, plan, placement, topology, pay))
    better = moves + way < stays
    note = (
        f"groups {min(rows)} to {max(rows)} a rank; dealt out evenly {pay.layers} layers take {moves * 1e3:.3g} instead of "
        f"{stays * 1e3:.3g} ms, and moving them {way * 1e3:.3g} ms more: {'dealt out' if better else 'left where they are'}"
    )
    taken = (dealt, elsewhere) if better else (staying, placement)
    return replace(taken[0], notes="\n".join(filter(None, (taken[0].notes, note)))), taken[1]


def _plan(merge: Merge, plan: Plan, placement: Placement, choices: Mapping[str, Any]) -> tuple[Plan, Placement]:
    taken_over: dict[str, Any] = dict(
        heads=plan.heads, kv_heads=plan.kv_heads, head_dim=plan.head_dim, dtype=plan.dtype, kernel=plan.kernel, world=plan.world
    )
    mask = over_slots(plan.mask, merge, placement)
    made = make_plan(placement.layout.length, **taken_over, mask=mask, layout=placement.layout, **choices)
    return made, placement


def _layers(plan: Plan, topology: Topology, pay: LayerCost, passes: Sequence[bool]) -> float:
    """Seconds of all layers in all passes."""
    rows = max(plan.rows(rank) for rank in range(plan.world)) * pay.batch
    beside = rows * pay.row_flops / topology.flops
    return pay.layers * sum(
        price(plan, topology, batch=pay.batch, backward=backward).seconds + beside * (1 + backward) for backward in passes
    )


def _moving(merge: Merge, plan: Plan, placement: Placement, topology: Topology, pay: LayerCost) -> float:
    """Seconds on the wire to merge once; unmerging, and the backward of both, take the same rows the same way."""
    rows, slots = owners(plan.layout), owners(placement.layout)
    links: Counter[tuple[int, int]] = Counter()
    for at in placement.of(merge.numbers).cpu():
        used = at >= 0
        link = rows.rank[used] * plan.world + slots.rank[at[used]]
        parcels = (link * placement.layout.length + at[used]).unique() // placement.layout.length  # a slot once from each rank
        for which, many in zip(*(t.tolist() for t in parcels.unique(return_counts=True)), strict=True):
            links[divmod(which, plan.world)] += many
    width = (pay.dim or plan.heads * plan.head_dim) * ITEMSIZE[plan.dtype]
    sent = {(src, dst): count * width for (src, dst), count in links.items() if src != dst}
    return transfer_seconds(sent, topology)
