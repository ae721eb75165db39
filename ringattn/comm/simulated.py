"""Runs all ranks in one process: the transport for debugging and tests.

It runs the same engine as the real transports, in lock step or in a random order drawn from a seed; counts bytes on every
directed link; can delay messages (they arrive only after the waiting rank has polled that many times) and drop them. When no
rank can proceed, it raises an error that lists which message each rank waits for, instead of hanging.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor

from ringattn.comm.transport import Port, Result
from ringattn.comm.wire_format import Wire
from ringattn.errors import CommError, StalledError
from ringattn.schedule.program import Message

MAX_IDLE_ROUNDS = 1000  # rounds without progress of any rank that count as a stall; delays must stay below


class Simulated:
    """A transport that hosts every rank. `bytes_sent[src, dst]` and `messages_sent[src, dst]` count what was sent.

    copy: whether messages are copied, as between real ranks. False: the receiver reads the sender's own memory, for timing the
    rest of a pass.
    """

    def __init__(
        self,
        world: int,
        *,
        delay: Callable[[Message], int] = lambda message: 0,
        drop: Callable[[Message], bool] = lambda message: False,
        shuffle: int | None = None,
        copy: bool = True,
    ) -> None:
        self.ranks = range(world)
        self.bytes_sent: Counter[tuple[int, int]] = Counter()
        self.messages_sent: Counter[tuple[int, int]] = Counter()
        self.delay, self.drop, self.copy = delay, drop, copy
        self.waiting_for: dict[int, str] = {}
        self._order = random.Random(shuffle) if shuffle is not None else None
        self._progress = 0

    def ports(self, label: str) -> list[SimulatedPort]:
        links: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        return [SimulatedPort(self, links, rank, label) for rank in self.ranks]

    def drive(self, runs: Sequence[Generator[None, None, Result]]) -> list[Result]:
        """Advance the ranks in turn until each has returned; raise `StalledError` when none can proceed."""
        results: dict[int, Result] = {}
        running = dict(enumerate(runs))
        idle_rounds = 0
        while running:
            before = self._progress
            for rank in self._turn_order(running):
                try:
                    next(running[rank])
                except StopIteration as stop:
                    results[rank] = stop.value
                    del running[rank]
                    self.advanced(rank)
            idle_rounds = idle_rounds + 1 if self._progress == before else 0
            if idle_rounds > MAX_IDLE_ROUNDS:
                stuck = "\n".join(f"  rank {rank} waits for {message}" for rank, message in sorted(self.waiting_for.items()))
                raise StalledError(f"every rank waits for a message that will not come:\n{stuck}")
        return [results[rank] for rank in range(len(runs))]

    def advanced(self, rank: int) -> None:
        self._progress += 1
        self.waiting_for.pop(rank, None)

    def _turn_order(self, running: Mapping[int, object]) -> list[int]:
        ranks = list(running)
        if self._order is not None:
            self._order.shuffle(ranks)
        return ranks


class SimulatedPort(Port):
    """One rank's end: sending copies into a queue per link, receiving takes from it in order."""

    def __init__(self, transport: Simulated, links: dict[tuple[int, int], deque[Tensor]], rank: int, label: str) -> None:
        self.rank, self._transport, self._links, self._label = rank, transport, links, label
        self._posted: dict[tuple[int, int], deque[tuple[Message, Tensor]]] = defaultdict(deque)
        self._handed_over: dict[Message, Tensor] = {}

    def allocate(self, wire: Wire, device: torch.device) -> Tensor:
        # A message that is handed over needs no memory here, only a size to check.
        return super().allocate(wire, device if self._transport.copy else torch.device("meta"))

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        for message, buffer in transfers:
            link = (message.src, message.dst)
            if message.dst == self.rank:
                self._posted[link].append((message, buffer))
            else:
                self._transport.bytes_sent[link] += buffer.nbytes
                self._transport.messages_sent[link] += 1
                if not self._transport.drop(message):
                    self._links[link].append(buffer.clone() if self._transport.copy else buffer)

    def wait(self, message: Message) -> Generator[None, None, Tensor | None]:
        link = (message.src, message.dst)
        polls = 0
        while message.dst == self.rank and any(pending is message for pending, _ in self._posted[link]):
            if self._links[link] and polls >= self._transport.delay(message):
                self._deliver(link)
            else:
                polls += 1
                self._transport.waiting_for[self.rank] = f"{message} ({self._label})"
                yield
        self._transport.advanced(self.rank)
        return self._handed_over.pop(message, None)

    def _deliver(self, link: tuple[int, int]) -> None:
        """Copy the oldest message on the link into the oldest buffer posted for it, as on a real link."""
        message, buffer = self._posted[link].popleft()
        arrived = self._links[link].popleft()
        if arrived.nbytes != buffer.nbytes:
            raise CommError(f"{self._label}: received {arrived.nbytes} bytes where {message} has {buffer.nbytes}")
        if self._transport.copy:
            buffer.copy_(arrived)
        else:
            self._handed_over[message] = arrived
