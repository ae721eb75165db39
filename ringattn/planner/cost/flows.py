"""Messages on their way: those between the same two ranks one behind another, all others at once, in fair shares.

That is what TCP connections, and queue pairs of RDMA, do with a port or an uplink that several of them use: each gets the same
part of it, so of equal messages that start together none is there before the others. A message moves at the least of its
shares; what it leaves unused of the other ones is given to nobody, which makes the model simple and errs to the slow side.

A start or an end changes the shares of those that use the same resources, and of no others: only these are looked at again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count

from ringattn.planner.topology import Resource, Topology
from ringattn.schedule.program import Message


class _Flow:
    """The first message of a pair of ranks: bytes left at the time `since`, and the bytes/s from then on."""

    __slots__ = ("left", "message", "number", "rate", "route", "since", "until")

    def __init__(self, message: Message, nbytes: int, topology: Topology, now: float, number: int) -> None:
        self.message, self.left, self.since, self.number = message, float(nbytes), now, number
        self.route = topology.route(message.src, message.dst)
        self.rate = self.until = 0.0

    def change(self, now: float, rate: float) -> None:
        self.left = max(0.0, self.left - (now - self.since) * self.rate)
        self.since, self.rate, self.until = now, rate, now + self.left / rate


class Flows:
    """What is on the links of `topology`. Ends come in the order of time, then of the start, so every run is the same."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._queues: dict[tuple[int, int], deque[tuple[Message, int]]] = defaultdict(deque)
        self._users: dict[Resource, list[_Flow]] = defaultdict(list)
        self._ends: list[tuple[float, int, int, _Flow]] = []  # perhaps several of a flow, of which the last holds
        self._numbers = count()

    def start(self, now: float, several: Iterable[tuple[Message, int]]) -> None:
        """These messages, with their bytes, are posted by both ends."""
        first = []
        for message, nbytes in several:
            queue = self._queues[message.src, message.dst]
            queue.append((message, nbytes))
            if len(queue) == 1:
                first.append(self._enter(now, message, nbytes))
        self._share(now, first)

    def next_end(self) -> float:
        """When the next message is through; infinity when none is on its way."""
        while self._ends and self._ends[0][0] != self._ends[0][-1].until:
            heappop(self._ends)
        return self._ends[0][0] if self._ends else float("inf")

    def end(self) -> Message:
        """The message that is through at `next_end`; it makes room for the one behind it."""
        now = self.next_end()
        flow = heappop(self._ends)[-1]
        flow.until = -1.0
        for resource, _ in flow.route:
            self._users[resource].remove(flow)
        queue = self._queues[flow.message.src, flow.message.dst]
        queue.popleft()
        self._share(now, [flow, *([self._enter(now, *queue[0])] if queue else [])])
        return flow.message

    def _enter(self, now: float, message: Message, nbytes: int) -> _Flow:
        flow = _Flow(message, nbytes, self._topology, now, next(self._numbers))
        for resource, _ in flow.route:
            self._users[resource].append(flow)
        return flow

    def _share(self, now: float, changed: Iterable[_Flow]) -> None:
        """Give everyone who shares a resource with `changed` its part."""
        touched = dict.fromkeys(user for flow in changed for resource, _ in flow.route for user in self._users[resource])
        for flow in touched:
            rate = min(bandwidth / len(self._users[resource]) for resource, bandwidth in flow.route)
            if rate != flow.rate:
                flow.change(now, rate)
                heappush(self._ends, (flow.until, flow.number, next(self._numbers), flow))
