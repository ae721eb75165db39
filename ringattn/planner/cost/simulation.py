"""Simulates all ranks of one pass: each runs its own program, waits for arrivals, posts messages and computes.

A message starts when both ends have posted it (see `flows`). Posting one, and calling a kernel, costs its rank a launch;
packing and merging run at the topology's memory rate. Events are processed in order of time, then of rank, so that every run is
the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import product

from ringattn.plan.plan import Plan
from ringattn.planner.cost.flows import Flows
from ringattn.planner.cost.sizes import Sizes
from ringattn.planner.topology import Topology
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Message, Step, TileBatch

MERGE = 2.5  # how often the bytes of a sum are touched when a partial result is added: both read, one written
BACKWARD_FLOPS = 2.5  # in multiples of forward: five matrix products instead of two


def flops(plan: Plan, area: int, sizes: Sizes) -> float:
    """Floating-point operations for `area` (query, key) pairs of all heads together: two matrix products in forward."""
    return 4 * area * plan.head_dim * sizes.batch * (BACKWARD_FLOPS if sizes.backward else 1.0)


class Simulation:
    """One pass of `plan` on `topology`."""

    def __init__(self, plan: Plan, topology: Topology, sizes: Sizes) -> None:
        self.topology, self.sizes = topology, sizes
        self.programs = [plan.program(rank, backward=sizes.backward) for rank in range(plan.world)]
        self.nbytes = {m: sum(map(sizes.travelling, m.items)) for m in plan.messages(backward=sizes.backward)}
        self.seconds = [
            {
                tile: flops(plan, area * head_group.heads.of_queries, sizes) / topology.flops
                for tile, area in head_group.areas.items()
            }
            for head_group in sizes.head_groups
        ]

    def run(self) -> float:
        """Seconds until the last rank is finished."""
        self.position = [0] * len(self.programs)
        self.events = [(0.0, rank) for rank in range(len(self.programs))]  # when each rank continues
        self.sums: set[tuple[int, Item]] = set()  # sums that exist, by rank
        self.packed: set[int] = set()  # ranks that have packed their next messages
        self.flows = Flows(self.topology)
        self.posted: set[Message] = set()  # by one end
        self.arrival: dict[Message, float] = {}
        self.waiting: dict[Message, list[int]] = defaultdict(list)  # ranks that wait for a message
        last = 0.0
        while self.events or self.flows.next_end() < float("inf"):
            if self.events and self.events[0][0] < self.flows.next_end():
                now, rank = heappop(self.events)
                last = max(last, now)
                if self.position[rank] < len(self.programs[rank]):
                    self._advance(now, rank, self.programs[rank][self.position[rank]])
            else:
                self._arrive(self.flows.next_end(), self.flows.end())
        return last

    def _advance(self, now: float, rank: int, step: Step) -> None:
        """Receives the arrivals of `step`, which may mean waiting; then posts, once all is packed; then computes."""
        for message in step.arrival:
            if message not in self.arrival:
                self.waiting[message].append(rank)
                return
        ready = max((self.arrival[message] for message in step.arrival), default=now)
        if ready > now:
            heappush(self.events, (ready, rank))
        elif rank not in self.packed:
            self.packed.add(rank)
            handling = sum(self._receive(m, rank) for m in step.arrival) + sum(self._pack(m, rank) for m in step.post)
            heappush(self.events, (now + handling, rank))
        else:
            self.packed.remove(rank)
            self._post(now, step.post)
            self.position[rank] += 1
            heappush(self.events, (now + sum(self._compute(tiles, rank) for tiles in step.tiles), rank))

    def _post(self, now: float, messages: Iterable[Message]) -> None:
        self.flows.start(now, [(message, self.nbytes[message]) for message in messages if message in self.posted])
        self.posted.update(messages)

    def _arrive(self, now: float, message: Message) -> None:
        self.arrival[message] = now + self.topology.latency(message.src, message.dst)
        for rank in self.waiting.pop(message, ()):
            heappush(self.events, (self.arrival[message], rank))

    def _compute(self, tiles: TileBatch, rank: int) -> float:
        """Seconds of the kernel, with a call for each segment, and of adding its results to the sums."""
        head_group, calls = tiles.head_group, len(self.sizes.head_groups[tiles.head_group].segments(tiles))
        merged = [Item(head_group, Kind.Q_ACC, i) for i in tiles.i] + [Item(head_group, Kind.KV_ACC, j) for j in tiles.j]
        self.sums.update((rank, item) for item in merged)
        touched = MERGE * sum(map(self.sizes.stored, merged))
        kernel = sum(self.seconds[head_group].get(tile, 0.0) for tile in product(tiles.i, tiles.j))
        return kernel + calls * self.topology.launch + touched / self.topology.memory

    def _pack(self, message: Message, rank: int) -> float:
        """Seconds that posting a message costs this end; the receiver only allocates a buffer."""
        return self.topology.launch + (self.nbytes[message] / self.topology.memory if message.src == rank else 0.0)

    def _receive(self, message: Message, rank: int) -> float:
        """Seconds that receiving a message costs: inputs are read in place, results are added to existing sums."""
        results = [item for item in message.items if item.kind.moved] if message.dst == rank else []
        added = [item for item in results if (rank, item) in self.sums]
        self.sums.update((rank, item) for item in results)
        return MERGE * sum(map(self.sizes.stored, added)) / self.topology.memory
