"""A rank of a job that something happens to, for test_faults: KIND FAULTY_RANK FILE TRANSPORT. Its attention runs until it
fails.

The faulty rank notes the time in FILE just before.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import ringattn
import ringattn.nn.grads
from ringattn.comm.p2p import P2PPort
from ringattn.comm.shared_memory import SharedMemoryPort

KIND, FAULTY, FILE, TRANSPORT = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
PORT = P2PPort if TRANSPORT == "p2p" else SharedMemoryPort
RANK = int(os.environ["RANK"])
DEADLINE = 5.0


def note() -> None:
    FILE.write_text(str(time.time()))


def signalled(number: int) -> None:
    note()
    os.kill(os.getpid(), number)


def when_waiting(word: str, action) -> None:
    """`action`, as soon as this rank waits for its second message of a pass whose label has `word`."""
    wait, observed = PORT.wait, []

    def waiting(port, message):
        if word in port._label:
            observed.append(message)
            if len(observed) == 2:
                action()
        return wait(port, message)

    PORT.wait = waiting


def fail(error: Exception) -> None:
    note()
    raise error


def exhaust() -> None:
    note()
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
    torch.empty(1 << 34, dtype=torch.uint8).fill_(1)


def sleep() -> None:
    note()
    time.sleep(3600)


def main() -> None:
    mesh = ringattn.init(timeout=DEADLINE, transport=TRANSPORT)
    how = dict(ulysses=4) if KIND == "kill in all-to-all" else dict(schedule="token_ring", ulysses=1)
    plan = ringattn.make_plan(512, world=4, heads=4, head_dim=16, topology="cpu", **how)
    q, k, v = (torch.randn(1, plan.rows(RANK), 4, 16, requires_grad=True) for _ in range(3))
    for step in range(1000):
        if step == 3 and RANK == FAULTY:
            prepare()
        out = ringattn.attention(q, k, v, plan)
        out.sum().backward()
        ringattn.nn.reduce_gradients([q], mesh)


def prepare() -> None:
    """What is to happen in this rank, now or in this step."""
    match KIND:
        case "kill in forward" | "kill in all-to-all":
            when_waiting("forward", lambda: signalled(signal.SIGKILL))
        case "kill in backward":
            when_waiting("backward", lambda: signalled(signal.SIGKILL))
        case "kill in reduction":
            ringattn.nn.grads.sum_over = lambda *_: signalled(signal.SIGKILL)
        case "stop":
            when_waiting("forward", lambda: signalled(signal.SIGSTOP))
        case "raise":
            fail(MemoryError("no room for k"))
        case "out of GPU memory":
            fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        case "raise in forward":
            when_waiting("forward", lambda: fail(MemoryError("no room for k")))
        case "exhaust":
            exhaust()
        case "sleep":
            sleep()
        case "be told to end":
            signalled(signal.SIGTERM)
            time.sleep(30)
        case "leave":
            note()
            sys.exit(0)


if __name__ == "__main__":
    main()
