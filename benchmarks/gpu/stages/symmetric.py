"""Runs several processes on one device that reach each other through memory they share, and checks every schedule's bits.

On a GPU that is torch's symmetric memory, whose processes take turns on the device: it shows right or wrong, and no speed. On a
CPU it is shared memory between processes, or point to point over gloo where the library has no such transport.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from common import SCHEDULES
from ranks import run_ranks
from real import judge, schedules_are_right, takes_transport
from stage import NotApplicable, Stage

import ringattn
from ringattn.comm import TRANSPORTS

OVERLAPPING = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}


def run(stage: Stage) -> None:
    name = transport(stage.device.type)
    if stage.device.type == "cuda" and name != "symmetric_memory":
        raise NotApplicable("this library has no transport over symmetric memory")
    stage.note(transport=name)
    job = f"stages.symmetric:rank_on_{stage.device.type}"
    for world in (2,) if stage.small else (2, 4):
        seconds = max(40.0, stage.left() / 2)
        ended = run_ranks(world, job, seconds, **(OVERLAPPING if stage.device.type == "cuda" else {}))
        judge(stage, "processes", world, ended, transport=name)


def transport(device: str) -> str:
    """The one to use, by what this version of the library has."""
    wanted = "symmetric_memory" if device == "cuda" else "shared_memory"
    return wanted if takes_transport() and wanted in TRANSPORTS else "p2p"


def rank_on_cuda() -> dict[str, Any]:
    torch.cuda.set_device(0)
    return rank("cuda", torch.bfloat16, SCHEDULES)


def rank_on_cpu() -> dict[str, Any]:
    return rank("cpu", torch.float32, ("ring", "token_ring"))


def rank(device: str, dtype: torch.dtype, schedules: tuple[str, ...]) -> dict[str, Any]:
    name = transport(device)
    # gloo carries what the processes agree on; NCCL would refuse two of them on one device.
    given: dict[str, Any] = {} if name == "p2p" else {"transport": name}
    ringattn.init(backend="gloo", timeout=60.0, **given)
    rows = schedules_are_right(torch.device(device), schedules, dtype)
    dist.barrier()
    dist.destroy_process_group()
    return {"rows": rows}
