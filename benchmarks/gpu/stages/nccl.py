"""Runs the point-to-point transport over NCCL, as far as one GPU allows, and kills a peer at the end. On a CPU: over gloo.

NCCL refuses two ranks on one GPU before 2.30, and allows them with NCCL_MULTI_RANK_GPU_ENABLE=1 from then on. Where there are
several GPUs each rank has its own.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ringattn
from common import SCHEDULES, plan_for
from ranks import run_ranks
from real import judge, schedules_are_right
from ringattn.comm.board import watch
from stage import Stage, first_line

SEVERAL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
FROM = (2, 30)
DEADLINE = 10.0  # seconds that a transfer may take before it is an error
KILLED_IN = 3  # the call in which rank 1 ends itself


def run(stage: Stage) -> None:
    device, several = stage.device.type, several_allowed(stage)
    first = [1, 2] if device == "cuda" and several else [1] if device == "cuda" else [2]
    for world in first:
        ended = run_ranks(world, f"stages.nccl:right_on_{device}", max(25.0, stage.left() / 3), **SEVERAL)
        judge(stage, "ranks", world, ended, backend="nccl" if device == "cuda" else "gloo")
        if any(one.error for one in ended):
            several = False
    if not several:
        return stage.omit("a killed peer: that takes two ranks that work")
    killed(stage, device)


def several_allowed(stage: Stage) -> bool:
    if stage.device.type != "cuda":
        return True
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    stage.note(nccl=".".join(map(str, version)), gpus=torch.cuda.device_count())
    if torch.cuda.device_count() == 1 and version[:2] < FROM:
        stage.omit("two ranks: NCCL before 2.30 refuses them on one GPU")
        return False
    return True


def killed(stage: Stage, device: str) -> None:
    """Rank 1 dies in the middle of a call; rank 0 must say so, by its number, and not hang."""
    limit = DEADLINE + 30
    survivor, _ = run_ranks(2, f"stages.nccl:loses_a_peer_on_{device}", max(limit, stage.left()), **SEVERAL)
    said = survivor.result or {"said": "", "seconds": None}
    stage.note(killed_peer=said | {"deadline": DEADLINE, "process": survivor.error})
    stage.check(not survivor.error, f"a killed peer: the survivor {survivor.error}")
    stage.check(
        "rank 1" in said["said"], f"a killed peer: the survivor did not name rank 1, but said: {said['said'] or 'nothing'}"
    )
    late = said["seconds"] is None or said["seconds"] > DEADLINE + 5
    stage.check(not late, f"a killed peer: the survivor took {said['seconds']} s, and {DEADLINE:g} s are allowed")


def join(device: str) -> torch.device:
    """This process's rank in a group over NCCL or gloo."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cpu":
        given = {"transport": "p2p"} if "transport" in ringattn.init.__kwdefaults__ else {}
        ringattn.init(backend="gloo", timeout=DEADLINE, **given)
        return torch.device("cpu")
    if torch.cuda.device_count() >= world:
        ringattn.init(backend="nccl", timeout=DEADLINE)
        return torch.device("cuda", torch.cuda.current_device())
    # `init` refuses to give one GPU to two ranks, with good reason outside of a test.
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl", timeout=torch.distributed.distributed_c10d.timedelta(seconds=DEADLINE))
    watch()
    return torch.device("cuda", torch.cuda.current_device())


def right_on_cuda() -> dict[str, Any]:
    return right(join("cuda"), torch.bfloat16, SCHEDULES)


def right_on_cpu() -> dict[str, Any]:
    return right(join("cpu"), torch.float32, ("ring", "token_ring"))


def right(device: torch.device, dtype: torch.dtype, schedules: tuple[str, ...]) -> dict[str, Any]:
    rows = schedules_are_right(device, schedules, dtype)
    dist.barrier()
    dist.destroy_process_group()
    return {"rows": rows}


def loses_a_peer_on_cuda() -> dict[str, Any]:
    return loses_a_peer(join("cuda"))


def loses_a_peer_on_cpu() -> dict[str, Any]:
    return loses_a_peer(join("cpu"))


def loses_a_peer(device: torch.device) -> dict[str, Any]:
    """What rank 0 is told, and how many seconds after the death of rank 1."""
    rank, file = dist.get_rank(), Path(os.environ["SCRATCH"]) / "killed"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = plan_for(256, 2, "token_ring", heads=4, head_dim=64, dtype=dtype)
    q, k, v = (torch.randn(1, plan.rows(rank), 4, 64, device=device, dtype=dtype) for _ in range(3))
    try:
        for call in range(1000):
            if call == KILLED_IN and rank == 1:
                file.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            ringattn.attention(q, k, v, plan)
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        return {
            "said": f"{type(error).__name__}: {first_line(error)}",
            "seconds": round(time.time() - float(file.read_text()), 2),
        }
    return {"said": "", "seconds": None}
