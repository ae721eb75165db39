"""Which process group, and which rank in it: the one place that reads torch.distributed's state."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.errors import LaunchError, MismatchError

Group = dist.ProcessGroup | DeviceMesh

LAUNCH_HINT = "start every rank with `torchrun --nproc-per-node N script.py` and call ringattn.init() first"


def group_and_rank(group: Group | None, world: int) -> tuple[dist.ProcessGroup | None, int]:
    """The process group to use and this process's rank in it. A world of 1 needs no group at all.

    `group` None is the default group. Raises `LaunchError` when there is none, `MismatchError` when it has another size.
    """
    if world == 1:
        return None, 0
    if not dist.is_available() or not dist.is_initialized():
        raise LaunchError(f"the plan is for {world} ranks but this process belongs to no process group; {LAUNCH_HINT}")
    if isinstance(group, DeviceMesh) and group.ndim != 1:
        raise MismatchError(
            f"group is a mesh of {group.ndim} dimensions; pass the one the sequence is cut over, as in mesh['sequence']"
        )
    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    process_group = dist.group.WORLD if process_group is None else process_group
    assert process_group is not None
    size = dist.get_world_size(process_group)
    if size != world:
        raise MismatchError(
            f"the plan is for {world} ranks and the group has {size}; pass the group as `world` to make_plan, and where it is "
            "not the default group pass it as `group` too (to shard and positions: rank=mesh['sequence'].get_local_rank())"
        )
    return process_group, dist.get_rank(process_group)


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be for this group to move them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
