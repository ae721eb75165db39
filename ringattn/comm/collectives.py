"""Collectives of torch.distributed that the board watches: sums and gathers over all ranks of a group.

On GPUs they return before they have run, and a rank that waits for a dead peer then waits somewhere else, in `.item()` for
example. So what they do to the stream is followed, like transfers. To be used inside `transferring`, which says what they are
for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.process_group import is_asynchronous
from ringattn.faults.pending import Reached, recorded
from ringattn.faults.watchdog import board, follow


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace `tensor` by its sum over `group`."""
    dist.all_reduce(tensor, group=group)
    _follow(group, tensor.device)


def all_gather(parts: Sequence[Tensor], tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `parts`, one for each rank, with the `tensor` of each; all of the same shape and dtype."""
    dist.all_gather(list(parts), tensor, group=group)
    _follow(group, tensor.device)


def _follow(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """By an event of the stream that now waits: the collective's own handle would keep its buffers until somebody looks."""
    if is_asynchronous(device) and board() is not None:
        follow([Reached(recorded(device))], group, device)
