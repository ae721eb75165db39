"""Runs the point-to-point transport over NCCL, as far as one GPU allows, and kills a peer at the end. On a CPU: over gloo.

NCCL refuses two ranks on one GPU before 2.30, and allows them with NCCL_MULTI_RANK_GPU_ENABLE=1 from then on. Where there are
several GPUs each rank has its own.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import SCHEDULES, plan_for, synchronize
from ranks import run_ranks
from real import judge, schedules_are_right, takes_transport
from stage import Stage

import ringattn
from ringattn.faults import watch

SEVERAL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
FROM = (2, 30)
DEADLINE, PATIENCE = 15.0, 60.0  # seconds that a transfer may take where a peer dies, and where none does
KILLED_IN = 3  # the call in which rank 1 ends itself


def run(stage: Stage) -> None:
    device, several = stage.device.type, several_allowed(stage)
    first = [1, 2] if device == "cuda" and several else [1] if device == "cuda" else [2]
    for world in first:
        ended = run_ranks(world, f"stages.nccl:right_on_{device}", max(40.0, stage.left() / 3), **SEVERAL)
        judge(stage, "ranks", world, ended, backend="nccl" if device == "cuda" else "gloo")
        if any(entry.error for entry in ended):
            several = False
    if several:
        killed(stage, device)
    else:
        stage.omit("a killed peer: that takes two ranks that work")


def several_allowed(stage: Stage) -> bool:
    if stage.device.type != "cuda":
        return True
    version = torch.cuda.nccl.version()
    stage.note(nccl=".".join(map(str, version)), gpus=torch.cuda.device_count())
    if torch.cuda.device_count() == 1 and version[:2] < FROM:
        stage.omit("two ranks: NCCL before 2.30 refuses them on one GPU")
        return False
    return True


def killed(stage: Stage, device: str) -> None:
    """Rank 1 dies in the middle of a call; rank 0 must say so, by its number, and end.

    It may do so by an error, or, since the GPU cannot be waited for any longer, by ending its process with a line on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "killed"
        job = f"stages.nccl:loses_a_peer_on_{device}"
        survivor, _ = run_ranks(2, job, max(DEADLINE + 25, stage.left()), **SEVERAL, KILLED=str(file))
        seconds = round(survivor.at - float(file.read_text()), 2) if file.exists() else None
    lines = [survivor.error, *reversed(survivor.output.splitlines())]
    words = next((text for text in lines if "rank 1" in text), survivor.error or "nothing")[:500]
    stage.note(killed_peer={"said": words, "seconds": seconds, "deadline": DEADLINE, "survivor": survivor.error})
    stage.check(seconds is not None, "a killed peer: rank 1 did not come to the call in which it ends itself")
    stage.check("rank 1" in words, f"a killed peer: the survivor did not name rank 1, but said: {words}")
    late = seconds is not None and seconds > DEADLINE + 10  # of which some are for a process to end in
    stage.check(not late, f"a killed peer: the survivor ended after {seconds} s, and a transfer may take {DEADLINE:g} s")


def join(device: str, timeout: float) -> torch.device:
    """This process's rank in a group over NCCL or gloo."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cpu":
        given: dict[str, Any] = {"transport": "p2p"} if takes_transport() else {}
        ringattn.init(backend="gloo", timeout=timeout, **given)
        return torch.device("cpu")
    if torch.cuda.device_count() >= world:
        ringattn.init(backend="nccl", timeout=timeout)
        return torch.device("cuda", torch.cuda.current_device())
    # `init` refuses to give one GPU to two ranks, with good reason outside of a test.
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl", timeout=timedelta(seconds=timeout))
    watch()
    return torch.device("cuda", torch.cuda.current_device())


def right_on_cuda() -> dict[str, Any]:
    return right(join("cuda", PATIENCE), torch.bfloat16, SCHEDULES)


def right_on_cpu() -> dict[str, Any]:
    return right(join("cpu", PATIENCE), torch.float32, ("ring", "token_ring"))


def right(device: torch.device, dtype: torch.dtype, schedules: tuple[str, ...]) -> dict[str, Any]:
    rows = schedules_are_right(device, schedules, dtype)
    dist.barrier()
    dist.destroy_process_group()
    return {"rows": rows}


def loses_a_peer_on_cuda() -> None:
    loses_a_peer(join("cuda", DEADLINE))


def loses_a_peer_on_cpu() -> None:
    loses_a_peer(join("cpu", DEADLINE))


def loses_a_peer(device: torch.device) -> None:
    """Calls attention until it fails, which it does since rank 1 kills itself after some calls."""
    rank, dtype = dist.get_rank(), torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = plan_for(256, 2, "token_ring", heads=4, head_dim=64, dtype=dtype)
    q, k, v = (torch.randn(1, plan.rows(rank), 4, 64, device=device, dtype=dtype) for _ in range(3))
    for call in range(1000):
        if call == KILLED_IN and rank == 1:
            Path(os.environ["KILLED"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        ringattn.attention(q, k, v, plan)
        synchronize(device)
