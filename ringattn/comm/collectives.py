"""Collectives of torch.distributed that the board watches: sums and gathers over all ranks of a group.

On GPUs they return before they have run, and a rank that waits for a dead peer then waits somewhere else, in `.item()` for
example. So their handles are followed like those of transfers. To be used inside `transferring`, which says what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.board import follow
from ringattn.comm.group import is_asynchronous


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace `tensor` by its sum over `group`."""
    _wait(dist.all_reduce(tensor, group=group, async_op=True), group, tensor.device)


def all_gather(parts: Sequence[Tensor], tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `parts`, one for each rank, with the `tensor` of each; all of the same shape and dtype."""
    _wait(dist.all_gather(list(parts), tensor, group=group, async_op=True), group, tensor.device)


def _wait(work: Any, group: dist.ProcessGroup | None, device: torch.device) -> None:
    if is_asynchronous(device):
        follow([work], group, device)
    work.wait()
