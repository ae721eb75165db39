"""What a plan costs: exact bytes on every directed link, and a prediction of time and memory on a topology.

Bytes are counted, not estimated, from the table in `payload` that `work` makes its tensors of.
Time is the end of a small simulation of all ranks (`simulation`): each goes through its own program, waits for what is due,
posts, computes; a transfer begins when both ends have posted it and shares its way with others (`flows`).

What it leaves out: kernels that are slower on small or narrow tiles, compute that transfers slow down. So it is for choosing
among plans; a duration to rely on must be measured. No torch here.
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

    seconds: float  # until the last rank is done
    compute_seconds: float  # of the rank that computes most
    transfer_seconds: float  # of the resource that carries most
    link_bytes: int  # on the directed pair of ranks that carries most
    total_bytes: int  # over all pairs
    buffer_bytes: int  # most that any rank holds beyond its own rows: foreign blocks, and messages on their way


def price(plan: Plan, topology: Topology, *, batch: int = 1, backward: bool = False) -> Cost:
    """Predict one pass of `plan` on `topology`. The same on every rank and every run."""
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
    """Seconds that the busiest rank computes: no pass can take less."""
    sizes = Sizes(plan, batch=batch, backward=backward)
    return flops(plan, max(pairs(sizes.head_groups).values(), default=0), sizes) / topology.flops


def transfer_seconds(links: Mapping[tuple[int, int], int], topology: Topology) -> float:
    """Seconds that the busiest resource needs to carry what `traffic` found: no pass can take less."""
    busy: dict[Resource, float] = defaultdict(float)
    for (src, dst), nbytes in links.items():
        for resource, bandwidth in topology.route(src, dst):
            busy[resource] += nbytes / bandwidth
    return max(busy.values(), default=0.0)
