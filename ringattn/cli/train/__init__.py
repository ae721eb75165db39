"""Trains a byte-level language model on long contexts, the sequence cut over ranks: `ringattn train` and launch/train.py.

    torchrun --nproc-per-node 4 -m ringattn train

On two cores this takes between one and two minutes: 40 steps of TokenRing attention over 8,192 bytes of Python source. SIGTERM
ends the run after the current step, with a checkpoint; `--resume` goes on from there, bit by bit.

The job is written as a user of ringattn would write it, with public functions alone: `loop` trains, `config` has the flags,
`data` reads the text, `model` builds the model, `restart` continues earlier runs, `report` and `plots` report.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from ringattn import CommError, LaunchError, RingAttnError
from ringattn.cli.train.config import TrainConfig

__all__ = ["TrainConfig", "main", "read_corpus", "run", "train", "windows"]

_HOME = {"read_corpus": "data", "windows": "data", "train": "loop"}  # with torch, imported when first used


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ringattn.cli.train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ringattn.cli.train' has no attribute {name!r}")


def main() -> NoReturn:
    """What launch/train.py calls: train with the flags of the command line, and end this process."""
    from ringattn.cli import require

    try:
        require("tyro", "rich", "torch")
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import tyro

    run(tyro.cli(TrainConfig))


def run(config: TrainConfig) -> NoReturn:
    """Train and end this process, with status 0, or 1 after an error, which is reported in one paragraph on stderr."""
    import torch.distributed as dist

    from ringattn.cli.train.loop import train

    try:
        train(config)
    except RingAttnError as error:
        _report(error, rank=dist.get_rank() if dist.is_initialized() else 0)
        _exit(1)  # at once: peers that destroying the group would wait for may be gone
    dist.destroy_process_group()
    _exit(0)


def _report(error: RingAttnError, rank: int) -> None:
    """An error that all ranks raise is reported by rank 0 alone; one of communication by each rank that has it, and where."""
    if isinstance(error, CommError):
        traceback.print_exception(error)
        print(f"error on rank {rank}: {error}", file=sys.stderr)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr)


def _exit(code: int) -> NoReturn:
    """At once: a process whose interpreter shuts down while gloo's threads still release tensors may abort instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if TYPE_CHECKING:
    from ringattn.cli.train.data import read_corpus as read_corpus
    from ringattn.cli.train.data import windows as windows
    from ringattn.cli.train.loop import train as train
