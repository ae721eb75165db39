"""Shared memory between real ranks: the bits and bytes of p2p, no trace of abandoned calls, and the same errors."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import HEADS, MASKS, SCHEDULES, Case, example
from spawn import RankFailure, run_ranks, torchrun

import ringattn
from ringattn import CommError, LaunchError, shard
from ringattn.comm import shared_memory_link, shared_memory_setup
from ringattn.comm.p2p import P2P, P2PPort
from ringattn.comm.select import choose, transport_for
from ringattn.comm.shared_memory import Links, SharedMemory
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options
from ringattn.schedule.program import Message

SMALL, TINY = 4096, 1500  # bytes of a ring and of what is copied at once, so that messages wrap around and are cut


def links_of(group: dist.ProcessGroup) -> Links:
    transport = transport_for(group)
    assert isinstance(transport, SharedMemory)
    return transport.links


def passes(group: dist.ProcessGroup, rank: int, world: int, dtype: torch.dtype, schedules: Iterable[str] = SCHEDULES) -> None:
    """Both passes of schedules over both transports: equal bits, and as many bytes on every link."""
    e = example(HEADS["9over3"], 41, MASKS["causal"])
    full = [x.detach().to(dtype) for x in (e.q, e.k, e.v, e.dout)]
    for schedule in schedules:
        plan = Case(schedule, "zigzag", "causal", "9over3", world, 41).plan(dtype=dtype)
        q, k, v, dout = (shard(x, plan, rank=rank).requires_grad_() for x in full)
        results = []
        for transport in (P2P(group), transport_for(group)):
            ((out, lse),) = attend([Inputs(q, k, v)], plan, Options(plan.head_dim**-0.5), transport)
            results.append((out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout), transport.bytes_sent))
        assert isinstance(transport, SharedMemory) and transport.bytes_sent
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], results[1][:-1], strict=True)), schedule
        assert results[0][-1] == results[1][-1], schedule


def same_bits(rank: int) -> None:
    """Groups of 2, 3 and 4 of the ranks, each with its own connections; the last with rings that are too small."""
    groups = {world: dist.new_group(range(world)) for world in (2, 3, 4)}
    choose(dist.group.WORLD, "shared_memory")
    for world, group in groups.items():
        if rank < world:
            passes(group, rank, world, torch.float32 if world == 3 else torch.bfloat16)
    shared_memory_link.SMALLEST = shared_memory_link.LARGEST = SMALL
    shared_memory_link.CHUNK = TINY
    passes(dist.group.WORLD, rank, 4, torch.float32, ("ring", "token_ring_direct", "ulysses_in_stages"))
    assert len(links_of(dist.group.WORLD).links) == 3


@pytest.mark.slow
def test_every_schedule_has_the_bits_and_bytes_of_p2p() -> None:
    run_ranks(4, same_bits)


def exchange(group: dist.ProcessGroup, rank: int, size: int, *, sends_first: bool = False) -> bool:
    """Ranks 0 and 1 of `group` send each other a message; whether the right one arrived. sends_first: finish the
    send before the receive, which gloo does not allow."""
    (port,) = transport_for(group).ports("a test")
    peer = 1 - rank
    outgoing, expected_bytes = (
        torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(r)) for r in (rank, peer)
    )
    received = torch.empty_like(outgoing)
    sent, expected = Message(rank, peer, 0, 1, ()), Message(peer, rank, 0, 1, ())
    port.post([(sent, outgoing)])
    for _ in port.wait(sent) if sends_first else ():
        pass
    port.post([(expected, received)])
    for message in (expected,) if sends_first else (expected, sent):
        for _ in port.wait(message):
            pass
    return torch.equal(received, expected_bytes)


def sends_first(rank: int) -> None:
    shared_memory_link.SMALLEST = shared_memory_link.LARGEST = SMALL
    choose(dist.group.WORLD, "shared_memory")
    assert all(exchange(dist.group.WORLD, rank, size, sends_first=True) for size in (0, 1, SMALL // 2))
    assert all(exchange(dist.group.WORLD, rank, size) for size in (SMALL + 1, 100_000))


def test_ranks_that_both_send_first_do_not_wait_for_each_other() -> None:
    run_ranks(2, sends_first)


def late_receiver(rank: int) -> None:
    """Rank 0 posts more small messages to rank 1 than a socket holds frames, before rank 1 receives the first. Then it waits
    for rank 2, which waits for rank 1, which waits for all of them: frames that did not fit must be sent meanwhile."""
    choose(dist.group.WORLD, "shared_memory")
    (port,) = transport_for(dist.group.WORLD).ports("a test")
    messages = [Message(0, 1, 0, 1, ()) for _ in range(2000)]
    buffers = [torch.full((n % 7,), n % 256 if rank == 0 else 0, dtype=torch.uint8) for n in range(2000)]
    posted = list(zip(messages, buffers, strict=True))
    then = [
        (Message(1, 2, 0, 1, ()), torch.ones(1, dtype=torch.uint8)),
        (Message(2, 0, 0, 1, ()), torch.ones(1, dtype=torch.uint8)),
    ]

    def finish(transfers: list[tuple[Message, torch.Tensor]]) -> None:
        for message, _ in transfers:
            for _ in port.wait(message):
                pass

    if rank == 0:
        port.post([*posted, then[1]])
    dist.barrier()
    if rank == 0:
        finish([then[1], *posted])
    if rank == 1:
        port.post(posted)
        finish(posted)
        port.post(then[:1])
        finish(then[:1])
        assert all((buffer == n % 256).all() for n, buffer in enumerate(buffers))
    if rank == 2:
        for transfer in then:
            port.post([transfer])
            finish([transfer])


def test_frames_wait_when_the_socket_is_full() -> None:
    run_ranks(3, late_receiver)


def abandoned(rank: int) -> None:
    """All ranks abandon a call with messages in every state: the next call has the right bits. Rank 0 then makes a call that
    the other does not make: an error."""
    shared_memory_link.SMALLEST = shared_memory_link.LARGEST = SMALL
    choose(dist.group.WORLD, "shared_memory")
    peer = 1 - rank
    for size in (0, 1, 1000, SMALL, 3 * SMALL):
        (port,) = transport_for(dist.group.WORLD).ports("a test")
        posted = [(Message(rank, peer, 0, 1, ()), torch.full((size,), 9, dtype=torch.uint8))] * 2
        posted += [(Message(peer, rank, 0, 1, ()), torch.zeros(size + 1, dtype=torch.uint8))] * rank  # of another size
        port.post(posted)
        assert all(exchange(dist.group.WORLD, rank, n) for n in (10, 3 * SMALL))
    if rank == 0:
        transport_for(dist.group.WORLD).ports("a call that rank 1 does not make")
    with pytest.raises(CommError, match=r"give\w+ up|closed"):
        exchange(dist.group.WORLD, rank, 10)
    with pytest.raises(CommError, match="no longer used since an earlier failure"):
        exchange(dist.group.WORLD, rank, 10)


def test_an_abandoned_call_does_not_reach_the_next_one() -> None:
    run_ranks(2, abandoned)


def other_ways(rank: int) -> None:
    """Automatic: p2p on all ranks where one of them cannot share. By name: the same error on all, which names that rank."""
    original = shared_memory_setup.mapped
    for name, breaks, words in (
        ("_host_identity", lambda: f"host{rank}", "rank 1: this host is host1, on rank 0 host0"),
        ("mapped", lambda n: torch.zeros_like(original(n)) if rank == 1 else original(n), "no access to the memory"),
        ("shared_memory", no_memory if rank == 1 else shared_memory_setup.shared_memory, "rank 1: .*no space left"),
    ):
        before = getattr(shared_memory_setup, name)
        setattr(shared_memory_setup, name, breaks)
        shared_memory_setup.CONNECTING = 1.0
        choose(dist.group.WORLD, None)
        assert type(transport_for(dist.group.WORLD)) is P2P
        assert exchange(dist.group.WORLD, rank, 10)
        with pytest.raises(LaunchError, match=f"transport='shared_memory' is not possible here: .*{words}.*'p2p'"):
            choose(dist.group.WORLD, "shared_memory")
        setattr(shared_memory_setup, name, before)
    with pytest.raises(LaunchError, match="ranks disagree on transport: rank 1: transport is p2p, on rank 0 automatic"):
        choose(dist.group.WORLD, "p2p" if rank else None)
    choose(dist.group.WORLD, None)
    assert isinstance(transport_for(dist.group.WORLD), SharedMemory) and exchange(dist.group.WORLD, rank, 10)


def no_memory(size: int) -> int:
    raise OSError(28, "no space left")


def test_all_ranks_take_p2p_or_raise_where_one_cannot_share() -> None:
    run_ranks(2, other_ways)


def memory_files() -> int:
    targets = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum("memfd:ringattn" in name for name in targets)


def groups_come_and_go(rank: int) -> None:
    """Without a choice nothing changes. Several groups at once; files stay as many as they were; another default group."""
    assert type(transport_for(dist.group.WORLD)) is P2P
    choose(dist.group.WORLD, None)
    groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([1, 0])]
    with torch.inference_mode():  # rings that are made here serve all later calls
        assert all(exchange(group, dist.get_rank(group), 100) for group in groups)
    assert all(exchange(group, dist.get_rank(group), 100) for group in groups) and len({id(links_of(g)) for g in groups}) == 3
    before = memory_files()
    assert all(exchange(group, dist.get_rank(group), size) for size in (5, 1 << 20, 1 << 23) for group in groups)
    assert memory_files() == before == 6  # a ring to and from the peer in each group
    store = dist.distributed_c10d._get_default_store()
    del groups
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    assert type(transport_for(dist.group.WORLD)) is P2P
    choose(dist.group.WORLD, "shared_memory")
    assert exchange(dist.group.WORLD, rank, 100)


def test_groups_have_separate_connections_and_leave_nothing_open() -> None:
    run_ranks(2, groups_come_and_go)


def dies_with_a_child(rank: int) -> float:
    """Rank 1 has forked a process that lives on. It has been killed: rank 0 notices at once all the same."""
    choose(dist.group.WORLD, "shared_memory")
    assert exchange(dist.group.WORLD, rank, 100)
    child = os.fork() if rank == 1 else 0
    if rank == 1 and child == 0:
        time.sleep(4)
        os._exit(0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(CommError, match="closed by peer: rank 1"):
        exchange(dist.group.WORLD, rank, 100)
    assert time.monotonic() - begin < 3
    raise RuntimeError("rank 0 is done")


def test_a_forked_child_does_not_hide_the_end_of_its_rank() -> None:
    with pytest.raises(RankFailure, match="rank 0 is done"):
        run_ranks(2, dies_with_a_child)


def test_tensors_on_other_devices_go_by_p2p(monkeypatch: pytest.MonkeyPatch) -> None:
    posted = []
    monkeypatch.setattr(P2PPort, "post", lambda port, transfers: posted.extend(transfers))
    port = SharedMemory.__new__(SharedMemory)
    port.links, port.ranks = Links({}, 1.0), (0,)
    buffer = torch.empty(3, dtype=torch.uint8, device="meta")
    port.ports("forward")[0].post([(Message(0, 1, 0, 1, ()), buffer)])
    assert len(posted) == 1


def alone(rank: int) -> None:
    choose(dist.group.WORLD, "shared_memory")
    assert type(transport_for(None)) is P2P


def test_one_rank_needs_no_transport() -> None:
    run_ranks(1, alone)


JOB = """
import ringattn, torch, torch.distributed as dist
from ringattn.comm.select import transport_for
for arguments in ({}, {"transport": "p2p"}, {"transport": "shared_memory"}):
    mesh = ringattn.init(timeout=20, **arguments)
    print(type(transport_for(mesh.get_group())).__name__ + "\\n", end="", flush=True)  # one write: ranks share stdout
    plan = ringattn.make_plan(64, world=mesh, heads=2, head_dim=8)
    q = torch.ones(1, plan.rows(mesh.get_local_rank()), 2, 8, requires_grad=True)
    ringattn.attention(q, q, q, plan).sum().backward()
dist.destroy_process_group()
"""


def test_init_chooses(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    code, out, err = torchrun(str(tmp_path / "job.py"), ranks=2, PYTHONPATH=str(Path(ringattn.__file__).parent.parent))
    assert code == 0, err
    assert (out.count("SharedMemory"), out.count("P2P")) == (4, 2)  # lines of two ranks may run into each other
