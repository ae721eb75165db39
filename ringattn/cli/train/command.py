"""`ringattn train` as a command: on the ranks of torchrun, or on one rank where no launcher has started this process."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import tyro

from ringattn.cli import require
from ringattn.cli.train import run
from ringattn.cli.train.config import TrainConfig

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes that srun or mpirun has started


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a byte-level language model on long contexts, the sequence cut over the ranks of torchrun; without it on one."""
    require("torch")
    if _alone():
        print("one rank; for N: torchrun --nproc-per-node N -m ringattn train ...", file=sys.stderr, flush=True)
        _be_the_only_rank()
    run(config)


def _alone() -> bool:
    """Whether nothing says that this process is one of several: then it is a job by itself."""
    return not any(name in os.environ for name in TORCHRUN) and not any(os.environ.get(name, "1") != "1" for name in OTHERS)


def _be_the_only_rank() -> None:
    """Say in torchrun's variables that there is one rank, which `ringattn.init` reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
