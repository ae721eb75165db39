"""Whether groups stay where they are or are dealt out evenly: both are planned and priced, and the cheaper one is taken.

After merging by content ranks hold different numbers of groups, and all wait for the one with most. Dealing them out anew costs
sending what moves to another rank, and back, in each pass; it gains in every layer that runs on the groups. Both are in the
plan's description. Where no rank has more than `WORTH_A_LOOK` of the mean, groups stay and nothing is reckoned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ringattn.arguments import count, number, shown
from ringattn.compress.merge import Merge
from ringattn.compress.placement import Placement, edges, even, in_stripes, over_slots, stay
from ringattn.compress.route import homes
from ringattn.cost import ITEMSIZE, price, transfer_seconds
from ringattn.errors import InputError
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.planner.request import topology_for
from ringattn.topology import Topology

WORTH_A_LOOK = 1.1  # times the mean


@dataclass(frozen=True)
class Pay:
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


def placed(merge: Merge, plan: Plan, layout: str, bucket: int, pay: Pay, choices: Mapping[str, Any]) -> tuple[Plan, Placement]:
    """The plan over groups and where they lie."""
    if not isinstance(layout, str) or layout not in ("auto", "stay", "even"):
        raise InputError(f"layout={shown(layout)}; choose auto, stay or even")
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


def _layers(plan: Plan, topology: Topology, pay: Pay, passes: Sequence[bool]) -> float:
    """Seconds of all layers in all passes."""
    rows = max(plan.rows(rank) for rank in range(plan.world)) * pay.batch
    beside = rows * pay.row_flops / topology.flops
    return pay.layers * sum(
        price(plan, topology, batch=pay.batch, backward=backward).seconds + beside * (1 + backward) for backward in passes
    )


def _moving(merge: Merge, plan: Plan, placement: Placement, topology: Topology, pay: Pay) -> float:
    """Seconds on the wire to merge once; unmerging, and the backward of both, take the same rows the same way."""
    rows, slots = homes(plan.layout), homes(placement.layout)
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
