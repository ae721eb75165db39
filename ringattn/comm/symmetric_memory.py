"""Moves messages between GPUs of one host by copies into each other's memory, over torch's symmetric memory.

Every rank allocates an arena of the same size, with a few slots for each peer. Messages pass through the slots of their link in
chunks, whatever their sizes. A slot is full or free, and each state is a signal in the memory of the rank that waits for it:
the sender waits for "free" (not in the first round), copies, and signals "full"; the receiver waits for "full", copies out, and
signals "free". torch's signals are flags that only the waiting rank resets, so there are no epochs to count.

The host never waits: sends are queued on one side stream and receives on another, in the global order of messages, which both
ends share, so no two ranks can wait for each other; `wait` orders the caller's stream behind them. There are two streams and
not two for each peer: GPUs have few queues, and a wait at the head of one stops all that share it.

Each chunk carries the number of its call, message and position, compared on the device when it arrives: a call that one rank
has given up is an error of the device, never wrong numbers. So is a signal that does not arrive within the deadline of the
group; the process must end after either. Tensors on CPUs are sent by `p2p`.

It is used only when named: its logic is tested with plain tensors, but it has not run on GPUs yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.p2p import P2P, P2PPort
from ringattn.faults.watchdog import comm_errors
from ringattn.schedule.program import Message

SLOTS = 4  # of each directed link: chunks that may be in flight
SLOT_BYTES = 4 << 20
TAG_BYTES = 16  # behind the data of a slot, 8 of them used
FULL, FREE = 0, 1  # a signal's channel is kind * slots + slot
OLDEST_TORCH = (2, 11)  # with the signatures used here


class Memory(Protocol):
    """The part of `torch._C._distributed_c10d._SymmetricMemory` that is used. Its calls are queued on the current stream."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int | None = 0) -> Tensor:
        """Memory of `rank` as a tensor; the offset counts elements of `dtype`."""

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Wait until the flag of this rank and `channel` at `dst_rank` is down, and raise it."""

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Wait until `src_rank` has raised its flag of `channel` here, and put it down."""


class Side(Protocol):
    """Where transfers of one direction are queued, in order."""

    def run(self, operation: Callable[[], None], buffer: Tensor) -> Any:
        """Queue `operation` on `buffer` behind what the caller has queued so far; returns a mark of its end."""

    def join(self, mark: Any) -> None:
        """Order everything that the caller queues from now on after `mark`."""


class SideStream:
    """A separate stream on a GPU, with higher priority than ordinary streams."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    def run(self, operation: Callable[[], None], buffer: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            operation()
            buffer.record_stream(self._stream)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def join(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)


class Arena:
    """The slots of this rank and of its peers. owner: keeps the memory allocated; timeout_ms: of each signal."""

    def __init__(
        self,
        memory: Memory,
        sends: Side,
        receives: Side,
        *,
        timeout_ms: int,
        device_type: str = "cuda",
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
        owner: Tensor | None = None,
    ) -> None:
        self.memory, self.device_type, self._owner = memory, device_type, owner
        self.sends, self.receives = sends, receives
        self._timeout, self._slots, self._slot_bytes = timeout_ms, slots, slot_bytes
        self._sent: Counter[int] = Counter()  # chunks to and from each peer since the arena was created
        self._received: Counter[int] = Counter()
        self.calls = 0

    @staticmethod
    def size(world: int, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> int:
        """Bytes of the arena of one rank."""
        return world * slots * (slot_bytes + TAG_BYTES)

    def send(self, peer: int, buffer: Tensor, tag: int) -> None:
        """Send on the current stream, that of sends. buffer: uint8, contiguous; tag: as the receiver expects it."""
        for index, chunk in enumerate(_chunks(buffer, self._slot_bytes)):
            slot, reused = self._sent[peer] % self._slots, self._sent[peer] >= self._slots
            if reused:
                self.memory.wait_signal(peer, FREE * self._slots + slot, self._timeout)
            data, label = self._slot(peer, self.memory.rank, slot, chunk.numel())
            data.copy_(chunk, non_blocking=True)
            label.fill_(tag + index)
            self.memory.put_signal(peer, FULL * self._slots + slot, self._timeout)
            self._sent[peer] += 1

    def receive(self, peer: int, buffer: Tensor, tag: int) -> None:
        """Receive on the current stream, that of receives; arguments as in `send`."""
        for index, chunk in enumerate(_chunks(buffer, self._slot_bytes)):
            slot = self._received[peer] % self._slots
            self.memory.wait_signal(peer, FULL * self._slots + slot, self._timeout)
            data, label = self._slot(self.memory.rank, peer, slot, chunk.numel())
            torch._assert_async(label == tag + index, f"rank {peer} sent another message: a call was given up half-way")
            chunk.copy_(data, non_blocking=True)
            self.memory.put_signal(peer, FREE * self._slots + slot, self._timeout)
            self._received[peer] += 1

    def _slot(self, owner: int, sender: int, slot: int, nbytes: int) -> tuple[Tensor, Tensor]:
        """Data and tag of a slot for `sender` in the memory of `owner`."""
        start = (sender * self._slots + slot) * (self._slot_bytes + TAG_BYTES)
        data = self.memory.get_buffer(owner, (nbytes,), torch.uint8, start)
        return data, self.memory.get_buffer(owner, (), torch.int64, (start + self._slot_bytes) // 8)


def _chunks(buffer: Tensor, nbytes: int) -> Sequence[Tensor]:
    return buffer.split(nbytes) if buffer.numel() else ()


def unsupported_reason() -> str:
    """Why this process has no symmetric memory; empty if it should have it."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}; update it"
    return ""


def open_arena(group: dist.ProcessGroup, timeout: float) -> Arena:
    """Allocate the arenas of all ranks of `group` and map each other's. Collective; raises `RuntimeError` where torch does.

    timeout: seconds that a signal may take to arrive.
    """
    import torch.distributed._symmetric_memory as symmetric  # takes a second, and needs a build with distributed

    device = torch.device("cuda", torch.cuda.current_device())
    owner = symmetric.empty(Arena.size(dist.get_world_size(group)), dtype=torch.uint8, device=device)
    memory = symmetric.rendezvous(owner, group)
    return Arena(memory, SideStream(device), SideStream(device), timeout_ms=int(timeout * 1e3), owner=owner)


class SymmetricMemory(P2P):
    """A transport that hosts this process's rank of `group`, all of whose ranks have GPUs of this host."""

    def __init__(self, group: dist.ProcessGroup | None, arena: Arena) -> None:
        super().__init__(group)
        self.arena, self.ranks = arena, (arena.memory.rank,)

    def ports(self, label: str) -> list[P2PPort]:
        self._label = label
        return [SymmetricMemoryPort(self, self.ranks[0], label)]


class SymmetricMemoryPort(P2PPort):
    """This rank's end during one pass."""

    def __init__(self, transport: SymmetricMemory, rank: int, label: str) -> None:
        super().__init__(transport, rank, label)
        self._arena = transport.arena
        self._arena.calls += 1
        self._numbers: Counter[tuple[int, int]] = Counter()
        self._marks: dict[Message, tuple[Side, Any]] = {}

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        if transfers[0][1].device.type != self._arena.device_type:
            return super().post(transfers)
        with comm_errors(self._doing, self._failed, transfers[0][0]):
            for message, buffer in transfers:
                self._marks[message] = self._queued(message, buffer.view(torch.uint8))
        return None

    def _queued(self, message: Message, buffer: Tensor) -> tuple[Side, Any]:
        arena, link = self._arena, (message.src, message.dst)
        tag = (arena.calls << 32) + (self._numbers[link] << 16)  # of 65,536 messages and 65,536 chunks of each, 256 GiB
        self._numbers[link] += 1
        if message.dst == self.rank:
            return arena.receives, arena.receives.run(lambda: arena.receive(message.src, buffer, tag), buffer)
        self._transport.bytes_sent[link] += buffer.numel()
        self._transport.messages_sent[link] += 1
        return arena.sends, arena.sends.run(lambda: arena.send(message.dst, buffer, tag), buffer)

    def wait(self, message: Message) -> Generator[None, None, None]:
        if message not in self._marks:
            yield from super().wait(message)
            return
        with comm_errors(self._doing, self._failed, message):
            side, mark = self._marks.pop(message)
            side.join(mark)
