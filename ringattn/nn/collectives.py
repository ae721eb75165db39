"""Sums tensors over a process group that no plan describes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.comm.collectives import all_reduce
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError, MismatchError
from ringattn.execution.checks import agreed_error, check_group
from ringattn.faults.watchdog import comm_errors


def reduction_group(group: Group | None) -> dist.ProcessGroup | None:
    """Resolves `group`, or the default group, to a process group; None where there is none, or it has one rank."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        check_group(group)
        world = group.size() if isinstance(group, DeviceMesh) else dist.get_world_size(group)
        return group_and_rank(group, world)[0]
    except (InputError, MismatchError) as error:
        raise agreed_error(error, group) from None


def sum_over(group: dist.ProcessGroup | None, tensor: Tensor, what: str) -> Tensor:
    """Sums `tensor` over `group` in place and returns it. Raises `CommError` when a rank fails; `what` names the sum."""
    if group is None:
        return tensor
    with comm_errors("summing", f"rank {dist.get_rank(group)}: {{about}} could not be summed over the ranks", what):
        all_reduce(tensor, group)
    return tensor
