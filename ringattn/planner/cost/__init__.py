"""Prices a plan: exact bytes on every directed link, and predicted time and memory on a topology.

Bytes are counted, not estimated, from the table in `wire_fields` from which `blocks` builds its tensors.
Time is the end of a small simulation of all ranks (`simulation`): each runs its own program, waits for arrivals, posts,
computes; a transfer begins when both ends have posted it and shares its route with others (`flows`).

Not modelled: kernels that are slower on small or narrow tiles, and compute that transfers slow down. So prices serve to choose
among plans; durations to rely on must be measured. No torch here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ringattn.plan.head_groups import pairs
from ringattn.plan.plan import Plan
from ringattn.planner.cost.simulation import BACKWARD_FLOPS, MERGE, Simulation, flops
from ringattn.planner.cost.sizes import ITEMSIZE, Sizes, peak_bytes, traffic
from ringattn.planner.topology import Resource, Topology

__all__ = ["BACKWARD_FLOPS", "ITEMSIZE", "MERGE", "Cost", "compute_seconds", "price", "traffic", "transfer_seconds"]


@dataclass(frozen=True)
class Cost:
    """One pass of one plan on one topology, for one layer."""

    seconds: float  # until the last rank is finished
    compute_seconds: float  # of the rank with most compute
    transfer_seconds: float  # of the resource with most to carry
    link_bytes: int  # on the directed pair of ranks with most bytes
    total_bytes: int  # over all pairs
    buffer_bytes: int  # the most that any rank holds beyond its own rows: foreign blocks, and messages in flight


def price(plan: Plan, topology: Topology, *, batch: int = 1, backward: bool = False) -> Cost:
    """Predicts one pass of `plan` on `topology`; the result is the same on every rank and in every run."""
    sizes = Sizes(plan, batch=batch, backward=backward)
    links = traffic(plan, batch=batch, backward=backward)
    return Cost(
        seconds=Simulation(plan, topology, sizes).run(),
        compute_seconds=compute_seconds(plan, topology, batch=batch, backward=backward),
        transfer_seconds=transfer_seconds(links, topology),
        link_bytes=max(links.values(), default=0),
        total_bytes=sum(links.values()),
        buffer_bytes=max(peak_bytes(plan.program(rank, backward=backward), rank, sizes) for rank in range(plan.world)),
    )


def compute_seconds(plan: Plan, topology: Topology, *, batch: int = 1, backward: bool = False) -> float:
    """Compute seconds of the busiest rank: no pass can take less."""
    sizes = Sizes(plan, batch=batch, backward=backward)
    return flops(plan, max(pairs(sizes.head_groups).values(), default=0), sizes) / topology.flops


def transfer_seconds(links: Mapping[tuple[int, int], int], topology: Topology) -> float:
    """Seconds that the busiest resource needs for the bytes of `traffic`: no pass can take less."""
    busy: dict[Resource, float] = defaultdict(float)
    for (src, dst), nbytes in links.items():
        for resource, bandwidth in topology.route(src, dst):
            busy[resource] += nbytes / bandwidth
    return max(busy.values(), default=0.0)
