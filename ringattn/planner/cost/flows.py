"""Simulates messages on links: those between the same two ranks go one after another, all others at once, in fair shares.

TCP connections, and queue pairs of RDMA, share a port or an uplink this way: each gets the same part of it, so of equal
messages that start together none arrives before the others. A message moves at the smallest of its shares; the unused part of
its other shares is not redistributed, which keeps the model simple and errs to the slow side.

A start or an end changes the shares of the messages on the same resources only; only these are recomputed.
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
    """The messages on the links of `topology`. Ends are ordered by time, then by start, so every run is the same."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._queues: dict[tuple[int, int], deque[tuple[Message, int]]] = defaultdict(deque)
        self._users: dict[Resource, list[_Flow]] = defaultdict(list)
        self._ends: list[tuple[float, int, int, _Flow]] = []  # a flow may have several, of which the last is valid
        self._numbers = count()

    def start(self, now: float, posted: Iterable[tuple[Message, int]]) -> None:
        """Starts messages, given with their bytes, that both ends have posted."""
        first = []
        for message, nbytes in posted:
            queue = self._queues[message.src, message.dst]
            queue.append((message, nbytes))
            if len(queue) == 1:
                first.append(self._enter(now, message, nbytes))
        self._share(now, first)

    def next_end(self) -> float:
        """When the next message ends; infinity when none is in flight."""
        while self._ends and self._ends[0][0] != self._ends[0][-1].until:
            heappop(self._ends)
        return self._ends[0][0] if self._ends else float("inf")

    def end(self) -> Message:
        """Ends the message that is complete at `next_end`, and starts the next one of its pair of ranks."""
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
        """Recomputes the rate of every flow that shares a resource with `changed`."""
        touched = dict.fromkeys(user for flow in changed for resource, _ in flow.route for user in self._users[resource])
        for flow in touched:
            rate = min(bandwidth / len(self._users[resource]) for resource, bandwidth in flow.route)
            if rate != flow.rate:
                flow.change(now, rate)
                heappush(self._ends, (flow.until, flow.number, next(self._numbers), flow))
