"""What a plan costs: exact bytes on every directed link, and a prediction of time and memory on a topology.

Bytes are counted, not estimated, from the table in `payload` that `work` makes its tensors of.
Time is the end of a small simulation of all ranks: each goes through its own program, waits for what is due, posts, computes; a
transfer begins when both ends have posted it and queues for every resource of its route, first come first served.

Every kernel call and message has its launch, and merging and packing go at the topology's rate of memory.

What it leaves out: kernels that are slower on small or narrow tiles, compute that transfers slow down. So it is for choosing
among plans; a duration to rely on must be measured. No torch here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product

from ringattn.payload import fields
from ringattn.plan import Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Message, Step, Work
from ringattn.topology import Resource, Topology

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes
MERGE = 2.5  # times that the bytes of a sum are touched when a share is added: both read, one written
BACKWARD_FLOPS = 2.5  # of forward: five matrix products instead of two


@dataclass(frozen=True)
class Cost:
    """One pass of one plan on one topology, for one layer."""

    seconds: float  # until the last rank is done
    compute_seconds: float  # of the rank that computes most
    transfer_seconds: float  # of the resource that carries most
    link_bytes: int  # on the directed pair of ranks that carries most
    total_bytes: int  # over all pairs
    buffer_bytes: int  # most that any rank holds beyond its own rows: foreign blocks, and messages on their way


class Sizes:
    """Bytes of every item of one pass, as it travels and as it is held.

    `bias_heads`: heads of key_bias, which travels with KV: 0 when there is none, 1 when all heads share it, else kv_heads.
    Values are taken to have the head_dim of queries.
    """

    def __init__(self, plan: Plan, *, batch: int = 1, backward: bool = False, bias_heads: int = 0) -> None:
        self.plan, self.batch, self.backward = plan, batch, backward
        self.lanes = plan.backward if backward else plan.forward
        narrow, wide = ITEMSIZE[plan.dtype], max(4, ITEMSIZE[plan.dtype])  # sums, lse, delta and biases are wide: fp32, or fp64
        # Sums are rounded to the plan's dtype only where it happens once: on the straight way home.
        wire = {
            (n, kind): narrow if not kind.moved or lane.schedule.straight_home(kind) else wide
            for n, lane in enumerate(self.lanes)
            for kind in Kind
        }
        self._travelling = {
            (*key, new): self._per_row(*key, size, wide, bias_heads, new) for key, size in wire.items() for new in (False, True)
        }
        self._rows = [([b.rows for b in lane.kv_blocks], [b.rows for b in lane.q_blocks]) for lane in self.lanes]
        self._held = {key: self._per_row(*key, wide if key[1].moved else narrow, wide, bias_heads) for key in wire}

    def travelling(self, item: Item) -> int:
        """Bytes of `item` in a message."""
        return self._rows[item.lane][item.kind.of_queries][item.index] * self._travelling[item.lane, item.kind, item.new]

    def held(self, item: Item) -> int:
        """Bytes of `item` between messages: sums are wide."""
        return self._rows[item.lane][item.kind.of_queries][item.index] * self._held[item.lane, item.kind]

    def _per_row(self, lane: int, kind: Kind, itemsize: int, wide: int, bias_heads: int, new: bool = False) -> int:
        """Of one row of all the lane's heads."""
        of = self.lanes[lane].heads
        heads = {"q": of.of_queries, "kv": of.of_keys, "bias": of.of_keys if bias_heads > 1 else bias_heads}
        return self.batch * sum(
            heads[field.heads] * (wide if field.wide else itemsize) * (self.plan.head_dim if field.dim else 1)
            for field in fields(kind, backward=self.backward, bias=bias_heads > 0, new=new)
        )


def traffic(plan: Plan, *, batch: int = 1, backward: bool = False, bias_heads: int = 0) -> dict[tuple[int, int], int]:
    """Bytes from each rank to each other that it sends anything to, in one pass: exactly what a transport counts."""
    sizes = Sizes(plan, batch=batch, backward=backward, bias_heads=bias_heads)
    links: Counter[tuple[int, int]] = Counter()
    for message in plan.messages(backward=backward):
        links[message.src, message.dst] += sum(map(sizes.travelling, message.items))
    return dict(links)


def price(plan: Plan, topology: Topology, *, batch: int = 1, backward: bool = False) -> Cost:
    """Predict one pass of `plan` on `topology`. The same on every rank and every run."""
    sizes = Sizes(plan, batch=batch, backward=backward)
    links = traffic(plan, batch=batch, backward=backward)
    return Cost(
        seconds=_Simulation(plan, topology, sizes).run(),
        compute_seconds=compute_seconds(plan, topology, batch=batch, backward=backward),
        transfer_seconds=transfer_seconds(links, topology),
        link_bytes=max(links.values(), default=0),
        total_bytes=sum(links.values()),
        buffer_bytes=max(_peak_bytes(plan.program(rank, backward=backward), rank, sizes) for rank in range(plan.world)),
    )


def compute_seconds(plan: Plan, topology: Topology, *, batch: int = 1, backward: bool = False) -> float:
    """Seconds that the busiest rank computes: no pass can take less."""
    sizes = Sizes(plan, batch=batch, backward=backward)
    work: Counter[int] = Counter()
    for lane in sizes.lanes:
        areas, heads = lane.areas, lane.heads.of_queries
        for _, rank, i, j in lane.whole.tiles:
            work[rank] += areas.get((i, j), 0) * heads
    return _flops(plan, max(work.values(), default=0), sizes) / topology.flops


def transfer_seconds(links: Mapping[tuple[int, int], int], topology: Topology) -> float:
    """Seconds that the busiest resource needs to carry what `traffic` found: no pass can take less."""
    busy: dict[Resource, float] = defaultdict(float)
    for (src, dst), nbytes in links.items():
        for resource, bandwidth in topology.route(src, dst):
            busy[resource] += nbytes / bandwidth
    return max(busy.values(), default=0.0)


def _flops(plan: Plan, area: int, sizes: Sizes) -> float:
    """Floating-point operations for `area` (query, key) pairs of all heads together: two matrix products in forward."""
    return 4 * area * plan.head_dim * sizes.batch * (BACKWARD_FLOPS if sizes.backward else 1.0)


class _Simulation:
    """All ranks of one pass on a clock. Events are taken in the order of time, then of rank, so every run is the same."""

    def __init__(self, plan: Plan, topology: Topology, sizes: Sizes) -> None:
        self.topology, self.sizes = topology, sizes
        self.programs = [plan.program(rank, backward=sizes.backward) for rank in range(plan.world)]
        self.nbytes = {m: sum(map(sizes.travelling, m.items)) for m in plan.messages(backward=sizes.backward)}
        self.seconds = [
            {tile: _flops(plan, area * lane.heads.of_queries, sizes) / topology.flops for tile, area in lane.areas.items()}
            for lane in sizes.lanes
        ]

    def run(self) -> float:
        """Seconds until the last rank is done."""
        self.position = [0] * len(self.programs)
        self.events = [(0.0, rank) for rank in range(len(self.programs))]  # when each rank goes on
        self.free: dict[Resource, float] = defaultdict(float)  # when each resource has let all before through
        self.posted: set[Message] = set()  # by one end
        self.arrival: dict[Message, float] = {}  # of those posted by both
        self.waiting: dict[Message, list[int]] = defaultdict(list)  # ranks at a message whose other end is not there yet
        end = 0.0
        while self.events:
            now, rank = heappop(self.events)
            if self.position[rank] < len(self.programs[rank]):
                self._go_on(now, rank, self.programs[rank][self.position[rank]])
            else:
                end = max(end, now)
        return end

    def _go_on(self, now: float, rank: int, step: Step) -> None:
        for message in step.due:
            if message not in self.arrival:
                self.waiting[message].append(rank)
                return
        ready = max((self.arrival[message] for message in step.due), default=now)
        if ready > now:
            heappush(self.events, (ready, rank))
            return
        for message in step.post:
            self._post(now, message)
        self.position[rank] += 1
        busy = sum(map(self._compute, step.tiles)) + sum(self._pack(message, rank) for message in step.post)
        heappush(self.events, (now + busy, rank))

    def _compute(self, tiles: Work) -> float:
        """The kernel's time, and that of adding what comes out of it to what is there."""
        lane = tiles.lane
        merged = [Item(lane, Kind.Q_ACC, i) for i in tiles.i] + [Item(lane, Kind.KV_ACC, j) for j in tiles.j]
        touched = MERGE * sum(map(self.sizes.held, merged))
        kernel = sum(self.seconds[lane].get(tile, 0.0) for tile in product(tiles.i, tiles.j))
        return kernel + self.topology.launch + touched / self.topology.memory

    def _pack(self, message: Message, rank: int) -> float:
        """What a message costs its sender; a receiver merges from where it is."""
        return self.topology.launch + self.nbytes[message] / self.topology.memory if message.src == rank else 0.0

    def _post(self, now: float, message: Message) -> None:
        if message not in self.posted:
            self.posted.add(message)
            return
        through = now
        for resource, bandwidth in self.topology.route(message.src, message.dst):
            self.free[resource] = max(self.free[resource], now) + self.nbytes[message] / bandwidth
            through = max(through, self.free[resource])
        self.arrival[message] = through + self.topology.latency(message.src, message.dst)
        for rank in self.waiting.pop(message, ()):
            heappush(self.events, (now, rank))


def _peak_bytes(program: Iterable[Step], rank: int, sizes: Sizes) -> int:
    """The most this rank holds at once that is not its own: buffers of messages, foreign inputs, partials for others."""
    held: dict[Item | Message, int] = {}
    peak = 0
    for step in program:
        for message in step.due:
            del held[message]
            if message.dst == rank:
                whole = (item._replace(new=False) for item in message.items if _home(sizes, item) != rank)
                held.update((item, sizes.held(item)) for item in whole)
        for message in step.post:
            held[message] = sum(map(sizes.travelling, message.items))
            for item in message.items if message.src == rank else ():
                if item.kind.moved:
                    held.pop(item, None)
        for work in step.tiles:
            results = [Item(work.lane, Kind.Q_ACC, i) for i in work.i] + [Item(work.lane, Kind.KV_ACC, j) for j in work.j]
            for item in results:
                if _home(sizes, item) != rank and (sizes.backward or item.kind is Kind.Q_ACC):
                    held[item] = sizes.held(item)
        peak = max(peak, sum(held.values()))
        for item in step.release:
            held.pop(item, None)
    return peak


def _home(sizes: Sizes, item: Item) -> int:
    return sizes.lanes[item.lane].schedule.home(item.kind, item.index)
