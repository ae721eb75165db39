"""Which process group, and which rank in it: the one place that reads torch.distributed's state."""

from __future__ import annotations

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
    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    process_group = dist.group.WORLD if process_group is None else process_group
    assert process_group is not None
    size = dist.get_world_size(process_group)
    if size != world:
        raise MismatchError(
            f"the plan is for {world} ranks and the group has {size}; pass the group as `world` to make_plan, "
            "or the sequence-parallel group (not the default one) as `group`"
        )
    return process_group, dist.get_rank(process_group)
