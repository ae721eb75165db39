"""Sums and gathers tensors over all ranks of a group, watched by the watchdog.

On GPUs a collective of torch.distributed returns before it has run, so a rank with a dead peer blocks somewhere else, in
`.item()` for example. Therefore an event on the stream is tracked, as for transfers. Call these inside `comm_errors`, which
names the purpose of the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.process_group import is_asynchronous
from ringattn.faults.pending import StreamEvent, record_event
from ringattn.faults.watchdog import follow, watchdog


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace `tensor` by its sum over `group`."""
    dist.all_reduce(tensor, group=group)
    _follow(group, tensor.device)


def all_gather(parts: Sequence[Tensor], tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `parts`, one for each rank, with the `tensor` of each; all of the same shape and dtype."""
    dist.all_gather(list(parts), tensor, group=group)
    _follow(group, tensor.device)


def _follow(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Track an event of the waiting stream; the collective's own handle would keep its buffers alive until it is polled."""
    if is_asynchronous(device) and watchdog() is not None:
        follow([StreamEvent(record_event(device))], group, device)
