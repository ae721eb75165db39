"""Seconds that count among ranks: those of the slowest, from a common start."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
import torch.distributed as dist


def slowest(action: Callable[[], object]) -> float:
    """Seconds that `action` takes on the slowest rank of the default group; collective, CPU."""
    dist.barrier()
    begin = perf_counter()
    action()
    seconds = torch.tensor(perf_counter() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()
