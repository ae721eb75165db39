"""What the survivors say and how soon they end, when a rank dies, stops, fails or sleeps: real processes, real signals."""

import json
import os
import random
import signal
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from spawn import finish, run_ranks, start
from test_init import free_port

import ringattn
from ringattn.comm.p2p import P2PPort

JOB = str(Path(__file__).parent / "fault_job.py")
DEADLINE = 5.0  # as in the job
SLACK = 4.0  # for processes to end in, where other tests run beside this one; alone they keep what is asked below

pytestmark = pytest.mark.timeout(60)


def outcome(kind: str, faulty: int, tmp_path: Path) -> tuple[float, list[str]]:
    """Seconds from the fault to the end of the last survivor, and what each survivor said; all must have failed."""
    port, file = free_port(), tmp_path / "fault"
    place = dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [start([JOB, kind, str(faulty), str(file)], RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(4)]
    survivors = [process for rank, process in enumerate(ranks) if rank != faulty]
    ended: dict[int, float] = {}
    until = time.monotonic() + 45
    while len(ended) < 3 and time.monotonic() < until:
        for process in survivors:
            if process.pid not in ended and process.poll() is not None:
                ended[process.pid] = time.time()
        time.sleep(0.01)
    os.kill(ranks[faulty].pid, signal.SIGKILL)  # stopped or asleep, perhaps
    said = [finish(process, timeout=1) for process in survivors]
    finish(ranks[faulty], timeout=5)
    assert all(code not in (0, None) for code, *_ in said), said
    seconds = max(ended.values()) - float(file.read_text())
    print(json.dumps({"fault": kind, "seconds": round(seconds, 2)}))
    return seconds, [err for _, _, err in said]


@pytest.mark.parametrize(
    ("kind", "faulty", "words", "within"),
    [
        ("kill in forward", 2, ("rank 2 (", "has died", "forward"), 3),
        ("kill in backward", 1, ("rank 1 (", "has died"), 3),
        ("kill in reduction", 3, ("rank 3 (", "has died"), 3),
        ("kill in forward", 0, ("rank 0",), DEADLINE + 3),
        ("stop", 2, ("rank 2 (", "has stalled"), DEADLINE + 3),
        ("raise", 2, ("rank 2 (", "MemoryError: no room for k"), 3),
        ("raise in forward", 1, ("rank 1 (", "MemoryError: no room for k"), 3),
        ("exhaust", 2, ("rank 2 (", "failed", "alloc"), 3),
        ("sleep", 2, ("rank 2 (", "has not come", "outside of transfers"), DEADLINE + 3),
    ],
)
def test_survivors_name_the_rank_and_the_cause_in_time(kind, faulty, words, within, tmp_path) -> None:
    seconds, said = outcome(kind, faulty, tmp_path)
    for err in said:
        for word in words:
            assert word in err, err
    assert seconds < within + SLACK


def disturbed(rank: int, seed: int | None) -> list[str]:
    """Digests of outputs and gradients of some calls; with a seed, ranks sleep at random before they wait."""
    plan = ringattn.make_plan(203, world=4, heads=3, head_dim=8, schedule="token_ring", topology="cpu", ulysses=1)
    source, sleep, wait = torch.Generator().manual_seed(rank), random.Random(f"{seed} {rank}"), P2PPort.wait

    def late(port, message):
        time.sleep(sleep.choice((0, 0, 0, 0.001, 0.004)))
        return wait(port, message)

    P2PPort.wait = wait if seed is None else late
    found = []
    for _ in range(CALLS):
        q, k, v = (torch.randn(1, plan.rows(rank), 3, 8, generator=source, requires_grad=True) for _ in range(3))
        out = ringattn.attention(q, k, v, plan)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        found.append(sha256(b"".join(x.detach().numpy().tobytes() for x in (out, *gradients))).hexdigest())
    return found


CALLS = 40  # of some 25 waits each on a rank


def test_delays_change_no_bit() -> None:
    calm = run_ranks(4, disturbed, None)
    assert run_ranks(4, disturbed, 1) == calm
