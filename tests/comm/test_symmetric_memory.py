"""The logic of transfers over symmetric memory, without a GPU: ranks are threads, memory and signals are plain objects.

Streams are threads too, so that what would wait on a GPU waits here, and a wrong order of signals hangs until its deadline.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from cases import HEADS, MASKS, SCHEDULES, Case, example, simulate
from spawn import run_ranks
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from ringattn import CommError, LaunchError, shard
from ringattn.comm.select import choose
from ringattn.comm.symmetric_memory import Arena, Memory, SymmetricMemory, unsupported_reason
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options
from ringattn.schedule.program import Message

SLOTS, SLOT_BYTES = 2, 96  # less than a message, so that slots are used again and again


class Shared:
    """Memory of all ranks: an arena of each, and the raised flags, each (rank, channel, from rank)."""

    def __init__(self, world: int) -> None:
        self.arenas = [torch.full((Arena.size(world, SLOTS, SLOT_BYTES),), 7, dtype=torch.uint8) for _ in range(world)]
        self.flags: set[tuple[int, int, int]] = set()
        self.changed = threading.Condition()


class FakeMemory:
    """The memory as one rank accesses it; the signatures are those of torch (see below)."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self.shared, self.rank, self.world_size = shared, rank, len(shared.arenas)

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int | None = 0) -> Tensor:
        memory = self.shared.arenas[rank].view(dtype)[storage_offset:]
        return memory[: sizes[0]] if sizes else memory[0]

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self._turn((dst_rank, channel, self.rank), timeout_ms, up=True)

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self._turn((self.rank, channel, src_rank), timeout_ms, up=False)

    def _turn(self, flag: tuple[int, int, int], timeout_ms: int, *, up: bool) -> None:
        shared = self.shared
        with shared.changed:
            if not shared.changed.wait_for(lambda: (flag in shared.flags) != up, timeout_ms / 1e3):
                raise RuntimeError(f"signal {flag} did not arrive")
            (shared.flags.add if up else shared.flags.remove)(flag)
            shared.changed.notify_all()


class FakeSide:
    """A thread in place of a stream. `join` raises the failure of an operation."""

    def __init__(self) -> None:
        self.operations: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self.error: Exception | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, operation: Callable[[], None], buffer: Tensor) -> threading.Event:
        self.operations.put((operation, done := threading.Event()))
        return done

    def join(self, mark: threading.Event) -> None:
        assert mark.wait(20)
        if self.error:
            raise RuntimeError(str(self.error))

    def _work(self) -> None:
        while True:
            operation, done = self.operations.get()
            try:
                operation()
            except Exception as error:
                self.error = error
            done.set()


def transports(world: int, timeout_ms: int = 20_000) -> list[SymmetricMemory]:
    shared = Shared(world)
    options = dict(timeout_ms=timeout_ms, device_type="cpu", slots=SLOTS, slot_bytes=SLOT_BYTES)
    return [SymmetricMemory(None, Arena(FakeMemory(shared, rank), FakeSide(), FakeSide(), **options)) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_schedule_has_the_bits_of_simulation(world: int) -> None:
    e = example(HEADS["9over3"], 41, MASKS["causal"])
    full = [x.detach().float() for x in (e.q, e.k, e.v, e.dout)]
    transports_of_ranks = transports(world)

    def passes(transport: SymmetricMemory) -> list[Tensor]:
        (rank,) = transport.ranks
        q, k, v, dout = (shard(x, plan, rank=rank).requires_grad_() for x in full)
        ((out, _),) = attend([Inputs(q, k, v)], plan, Options(plan.head_dim**-0.5), transport)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    with ThreadPoolExecutor(world) as threads:
        for schedule in SCHEDULES:
            plan = Case(schedule, "zigzag", "causal", "9over3", world, 41).plan(dtype=torch.float32)
            out, _, *grads = simulate(plan, *full)
            for rank, actual in enumerate(threads.map(passes, transports_of_ranks)):
                expected = [shard(x, plan, rank=rank) for x in (out, *grads)]
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), schedule
    assert all(transport.bytes_sent for transport in transports_of_ranks)


def exchange(transport: SymmetricMemory, size: int, *, receives: bool = True) -> bool:
    """Ranks 0 and 1 send each other `size` bytes at once."""
    (rank,), (port,) = transport.ranks, transport.ports("a test")
    received = torch.zeros(size, dtype=torch.uint8)
    sent, expected = Message(rank, 1 - rank, 0, 1, ()), Message(1 - rank, rank, 0, 1, ())
    port.post([(sent, torch.full((size,), rank + 1, dtype=torch.uint8)), *[(expected, received)] * receives])
    for message in (expected, sent) if receives else ():
        for _ in port.wait(message):
            pass
    return bool((received == 2 - rank).all())


@pytest.mark.parametrize("size", [0, 1, SLOT_BYTES, SLOT_BYTES + 1, 10_000])
def test_messages_of_any_size_pass_through_the_slots(size: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            assert all(threads.map(lambda transport: exchange(transport, size), transports(2)))


def test_a_call_that_a_rank_has_given_up_is_an_error_and_not_garbage() -> None:
    pair = transports(2, timeout_ms=500)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda transport: exchange(transport, 10, receives=transport.ranks == (1,)), pair[:1]))
        with pytest.raises(CommError, match="sent another message: a call was given up half-way"):
            list(threads.map(lambda transport: exchange(transport, 10), pair))


def test_a_signal_that_does_not_arrive_is_an_error() -> None:
    with pytest.raises(CommError, match="did not arrive"):
        exchange(transports(2, timeout_ms=50)[0], 10)


def test_the_signatures_are_those_of_torch() -> None:
    """Every method used is there, and takes the arguments by the names and in the order that are used (torch's are in the
    first line of their documentation)."""
    for name in ("get_buffer", "put_signal", "wait_signal"):
        words = getattr(_SymmetricMemory, name).__doc__.split("(", 1)[1]
        places = [
            words.index(f"{parameter}:") for parameter in signature(getattr(Memory, name)).parameters if parameter != "self"
        ]
        assert places == sorted(places)
    assert {"rank", "world_size", "rendezvous"} <= set(dir(_SymmetricMemory))


def refused(rank: int) -> None:
    with pytest.raises(LaunchError, match=r"transport='symmetric_memory' is not possible here: every rank: torch sees no GPU"):
        choose(dist.group.WORLD, "symmetric_memory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_is_refused_where_there_is_none() -> None:
    assert "sees no GPU" in unsupported_reason()
    run_ranks(2, refused)
