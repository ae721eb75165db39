"""Sends and receives messages point to point over torch.distributed, with gloo on CPUs and NCCL on GPUs.

Everything that departs in a step is posted at once, in the global order of messages, so both directions of every link start
together and both ends agree without tags. gloo moves the bytes in the background, and each transfer is waited for separately in
its arrival step. NCCL has one handle for a batch, so there the messages of each arrival step form a batch of their own, and no
wait includes later messages.

Why these batches cannot block each other: NCCL runs the batches of a rank one after another, on one stream, and a batch ends
when both ends of all its messages have begun. Both ends of a message know its departure and arrival step, so both have it in
the batch (departure, arrival), and every rank posts its batches in ascending order of these pairs. Take the least pair that
some rank has not finished: all batches before it are finished everywhere, so it has begun, or will, on every rank that has it.
What it sends was computed from messages that had arrived by its departure; they departed earlier, so they are in batches before
it.

gloo does not check size or dtype of what arrives. That is why shapes are agreed on before (see `agree`) and only bytes travel
here. Where the rank writes an event log, each pass is a line in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.gloo_duplex import prepare, receiving, sending, start
from ringattn.comm.process_group import capturing, waits_on_stream
from ringattn.comm.transport import Port, Result
from ringattn.faults.event_log import is_logging, note
from ringattn.faults.pending import StreamEvent, record_event
from ringattn.faults.watchdog import comm_errors, follow, watchdog
from ringattn.schedule.program import Message


class P2P:
    """A transport that hosts this process's rank of `group`. Counts bytes sent per link and seconds spent waiting."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        prepare(group)
        self.group = group
        self.ranks = (dist.get_rank(group) if group is not None else 0,)
        self.bytes_sent: Counter[tuple[int, int]] = Counter()
        self.messages_sent: Counter[tuple[int, int]] = Counter()
        self.seconds_waiting = 0.0
        self._label = ""
        self._longest: tuple[float, Message | None] = (0.0, None)  # wait of this pass
        self.device: torch.device | None = None  # whose stream runs this pass, once it has posted a transfer there
        self._begin: Any = None

    def ports(self, label: str) -> list[P2PPort]:
        self._label = label
        return [P2PPort(self, self.ranks[0], label)]

    def drive(self, runs: Sequence[Generator[None, None, Result]]) -> list[Result]:
        (run,) = runs
        begin, waited, sent = perf_counter(), self.seconds_waiting, self.bytes_sent.total()
        self._longest, self.device, self._begin = (0.0, None), None, None
        while True:
            try:
                next(run)
            except StopIteration as stop:
                if is_logging():
                    sent = self.bytes_sent.total() - sent
                    if self.device is None:
                        self._note(perf_counter() - begin, self.seconds_waiting - waited, sent)
                    else:
                        self._note_when_complete(self.device, perf_counter() - begin, sent)
                return [stop.value]

    def runs_on(self, device: torch.device) -> None:
        """Note that this pass posts to a stream of `device`: the host finishes it before it has run there."""
        if self.device is None:
            self.device = device
            if is_logging() and not capturing(device):
                self._begin = record_event(device, timed=True)

    def waited(self, message: Message, seconds: float) -> None:
        self.seconds_waiting += seconds
        if seconds > self._longest[0]:
            self._longest = seconds, message

    def _note(self, seconds: float, waited: float, sent: int) -> None:
        longest, message = self._longest
        wait = {} if message is None else {"longest": str(message), "longest_seconds": round(longest, 6)}
        note("pass", name=self._label, seconds=round(seconds, 6), waited=round(waited, 6), **wait, bytes_sent=sent)

    def _note_when_complete(self, device: torch.device, host: float, sent: int) -> None:
        """Log a pass on a GPU: seconds from its first transfer to its end there. The host does not wait for any of them."""
        fields = {"name": self._label, "host_seconds": round(host, 6), "bytes_sent": sent}
        if self._begin is None or watchdog() is None:  # captured in a graph, or no watchdog polls for its end
            note("pass", **fields, **({"captured": True} if capturing(device) else {}))
            return
        begin, end = self._begin, record_event(device, timed=True)

        def finished() -> None:
            note("pass", **fields, seconds=round(begin.elapsed_time(end) / 1e3, 6))

        with comm_errors(f"in {self._label}", ""):
            follow([StreamEvent(end)], self.group, device, finished)


class P2PPort(Port):
    """This rank's end during one pass."""

    def __init__(self, transport: P2P, rank: int, label: str) -> None:
        self.rank, self._transport, self._label = rank, transport, label
        self._pending: dict[Message, list[dist.Work]] = {}
        self._watchdog = watchdog()
        self._doing, self._failed = f"in {label}, waiting for", f"rank {rank}, {label}: {{about}} failed"

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        if waits_on_stream(buffer := transfers[0][1]):
            self._transport.runs_on(buffer.device)
            arrivals = {message.arrival for message, _ in transfers}
            if len(arrivals) > 1:
                for arrival in sorted(arrivals):
                    self.post([transfer for transfer in transfers if transfer[0].arrival == arrival])
                return
        ops = []
        for message, buffer in transfers:
            if message.dst == self.rank:
                ops.append(receiving(buffer, self._transport.group, self.rank, message.src))
            else:
                ops.append(sending(buffer, self._transport.group, self.rank, message.dst))
                self._transport.bytes_sent[message.src, message.dst] += buffer.nbytes
                self._transport.messages_sent[message.src, message.dst] += 1
        with comm_errors(self._doing, self._failed, transfers[0][0], self._watchdog):
            works = start(ops)
        for (message, _), work in zip(transfers, works, strict=True):
            self._pending[message] = work

    def wait(self, message: Message) -> Generator[None, None, None]:
        begin = perf_counter()
        with comm_errors(self._doing, self._failed, message, self._watchdog):
            for work in self._pending.pop(message):
                work.wait()
        if self._transport.device is None:  # else the stream waits and the host does not
            self._transport.waited(message, perf_counter() - begin)
        yield from ()
