"""A rank whose host runs ahead of its transfers, as with NCCL, for test_unfinished: KIND FAULTY_RANK FILE.

Transfers are gloo's, behind stand-ins for the handles NCCL gives: `wait` returns at once, `is_completed` is true when one
thread, the stand-in for a stream, has come to the end of the transfer. One that fails is never complete, and nobody raises an
error. At the end of a step the host reads a number, as in `.item()`, which waits for all of them.
"""

import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

import ringattn
from ringattn.comm import consistency as agree
from ringattn.comm import gloo_duplex as duplex
from ringattn.comm import p2p
from ringattn.faults import pending as pending

KIND, FAULTY, FILE = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
RANK = int(os.environ["RANK"])
DEADLINE = 5.0

stream = ThreadPoolExecutor(1)
posted: list["Handle"] = []


class Handle:
    """What NCCL's handles do, over one of gloo's; keeps the buffer, which the host may have let go."""

    def __init__(self, work, tensor: torch.Tensor) -> None:
        self._done: Future[None] = stream.submit(self._run, work)
        self._tensor = tensor
        posted.append(self)

    def _run(self, work) -> None:
        try:
            work.wait()
        except RuntimeError:
            time.sleep(3600)

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return self._done.done()


def fall_behind() -> None:
    post = duplex._post
    duplex._post = lambda transfer, connection: Handle(post(transfer, connection), transfer.tensor)
    # A dead rank is found, and an error heard of, long before a deadline; and where there is nothing but a deadline, rank 3
    # gives up long before the others, who then still wait without a word.
    seconds = {"kill": 60.0, "raise": 60.0, "stop": DEADLINE, "sleep": 3.0 if RANK == 3 else 60.0}[KIND]
    pending.timeout_of = lambda group, device: seconds
    agree.is_asynchronous = duplex.waits_on_stream = p2p.waits_on_stream = lambda device_or_tensor: True


def item() -> None:
    while not all(handle.is_completed() for handle in posted):
        time.sleep(0.01)
    posted.clear()


def main() -> None:
    ringattn.init(timeout=DEADLINE, transport="p2p")
    plan = ringattn.make_plan(512, world=4, heads=4, head_dim=16, topology="cpu", schedule="token_ring", ulysses=1)
    q, k, v = (torch.randn(1, plan.rows(RANK), 4, 16, requires_grad=True) for _ in range(3))
    for step in range(1000):
        if step == 2:
            fall_behind()
        if step == 4 and RANK == FAULTY:
            FILE.write_text(str(time.time()))
            match KIND:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "sleep":
                    time.sleep(3600)
                case "raise":
                    raise MemoryError("no room for k")
        ringattn.attention(q, k, v, plan, strict=False).sum().backward()
        item()
        if step == 3:
            time.sleep(1.0)  # all ranks have said what they do


if __name__ == "__main__":
    main()
