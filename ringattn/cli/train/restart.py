"""Decides whether a run continues from a checkpoint, and ends it with one when SIGTERM comes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn import CheckpointError
from ringattn.checkpoint import latest
from ringattn.cli.train.config import TrainConfig
from ringattn.comm import all_reduce
from ringattn.faults import comm_errors


def prepare_directory(config: TrainConfig, first: bool) -> bool:
    """Make --out ready, and return whether to continue from a checkpoint in it. The first rank decides for all; collective."""
    answer: list[bool | str] = [False]
    if first:
        try:
            answer = [checkpoint_to_resume(config) is not None]
        except (CheckpointError, OSError) as error:
            answer = [str(error)]
    with comm_errors("hearing from rank 0", "rank 0 did not say whether to resume"):
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise CheckpointError(answer[0])
    return answer[0]


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that the flags ask to continue from. None for a new run, whose directory is then empty."""
    newest = latest(config.out)
    if newest and (config.resume or config.auto_resume):
        return newest
    if config.resume:
        raise CheckpointError(
            f"--resume: there is no complete checkpoint in {config.out}; leave --resume out to start, or correct --out"
        )
    if newest or (config.out / "metrics.jsonl").exists():
        numbers = (n for n in range(1, sys.maxsize) if not config.out.with_name(f"{config.out.name}.{n}").exists())
        config.out.rename(config.out.with_name(f"{config.out.name}.{next(numbers)}"))
    config.out.mkdir(parents=True, exist_ok=True)
    return None


class StopRequest:
    """SIGTERM to any rank, which ends the run on all of them after the current step. It may come at any time."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.received = mesh, False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True

    def on_any_rank(self) -> bool:
        """Whether some rank has received one; the same answer on all ranks, each of which must ask."""
        received = torch.tensor(float(self.received), device=self.mesh.device_type)
        with comm_errors("summing", f"rank {self.mesh.get_local_rank()}: stop request could not be summed over the ranks"):
            all_reduce(received, self.mesh.get_group())
        return bool(received)
