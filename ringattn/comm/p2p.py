"""The real transport: point-to-point over torch.distributed, gloo on CPUs and NCCL on GPUs.

Everything that departs in a step is one `batch_isend_irecv`, in the global order of messages, so both directions of every link
start together and both ends agree without tags. gloo moves the bytes in the background; each transfer is waited for on its own,
when due. NCCL may return one handle for the whole batch; then waiting for its first message waits for all.

gloo checks neither size nor dtype of what arrives. That is why shapes are agreed on before (see `agree`) and only bytes travel
here. Where the rank keeps a journal, each pass is a line in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from time import perf_counter

import torch.distributed as dist
from torch import Tensor

from ringattn.comm.board import transferring
from ringattn.comm.duplex import prepare, receiving, sending, start
from ringattn.comm.journal import kept, note
from ringattn.comm.transport import Port, Result
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

    def ports(self, label: str) -> list[P2PPort]:
        self._label = label
        return [P2PPort(self, self.ranks[0], label)]

    def drive(self, runs: Sequence[Generator[None, None, Result]]) -> list[Result]:
        (run,) = runs
        begin, waited, sent = perf_counter(), self.seconds_waiting, self.bytes_sent.total()
        self._longest = (0.0, None)
        while True:
            try:
                next(run)
            except StopIteration as stop:
                if kept():
                    self._note(perf_counter() - begin, self.seconds_waiting - waited, self.bytes_sent.total() - sent)
                return [stop.value]

    def waited(self, message: Message, seconds: float) -> None:
        self.seconds_waiting += seconds
        self._longest = max(self._longest, (seconds, message), key=lambda wait: wait[0])

    def _note(self, seconds: float, waited: float, sent: int) -> None:
        longest, message = self._longest
        said = {} if message is None else {"longest": str(message), "longest_seconds": round(longest, 6)}
        note("pass", name=self._label, seconds=round(seconds, 6), waited=round(waited, 6), **said, bytes_sent=sent)


class P2PPort(Port):
    """This rank's end during one pass."""

    def __init__(self, transport: P2P, rank: int, label: str) -> None:
        self.rank, self._transport, self._label = rank, transport, label
        self._pending: dict[Message, list[dist.Work]] = {}
        self._doing, self._failed = f"in {label}, waiting for", f"rank {rank}, {label}: {{about}} failed"

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        ops = []
        for message, buffer in transfers:
            if message.dst == self.rank:
                ops.append(receiving(buffer, self._transport.group, self.rank, message.src))
            else:
                ops.append(sending(buffer, self._transport.group, self.rank, message.dst))
                self._transport.bytes_sent[message.src, message.dst] += buffer.nbytes
                self._transport.messages_sent[message.src, message.dst] += 1
        with transferring(self._doing, self._failed, transfers[0][0]):
            works = start(ops)
        for (message, _), work in zip(transfers, works, strict=True):
            self._pending[message] = work

    def wait(self, message: Message) -> Generator[None, None, None]:
        begin = perf_counter()
        with transferring(self._doing, self._failed, message):
            for work in self._pending.pop(message):
                work.wait()
        self._transport.waited(message, perf_counter() - begin)
        yield from ()
