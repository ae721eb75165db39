"""Resolves the process group of a call and this process's rank in it; the only module that reads torch.distributed's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.errors import LaunchError, MismatchError

Group = dist.ProcessGroup | DeviceMesh

CPU = torch.device("cpu")

_backends: WeakKeyDictionary[dist.ProcessGroup, Mapping[str, str]] = WeakKeyDictionary()  # an entry ends with its group

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


def backends(group: dist.ProcessGroup) -> Mapping[str, str]:
    """The backend that moves tensors of each device type between the ranks of `group`: {"cpu": "gloo", "cuda": "nccl"}.

    Read from the backends themselves, once per group: `get_backend` returns "undefined" where the group was started without a
    name, and a pair of names where it has two. gloo registers for GPUs too, but sends no GPU tensors point to point.
    """
    by_device = _backends.get(group)
    if by_device is None:
        names = {device.type: group._get_backend(device).name() for device in group._device_types}
        by_device = {device: name for device, name in names.items() if name != "gloo" or device == "cpu"}
        _backends[group] = by_device
    return by_device


def describe_backends(group: dist.ProcessGroup) -> str:
    """The backends of `group` as text: "cpu:gloo", or "cpu:gloo,cuda:nccl"."""
    return ",".join(f"{device}:{name}" for device, name in backends(group).items())


def supports_device(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `group` can send tensors of this device."""
    return device.type in backends(group)


def cannot_move(group: dist.ProcessGroup | None, name: str, tensor: torch.Tensor) -> str | None:
    """The error message where `group` cannot move tensors of the device that `tensor` is on; else None."""
    if group is None or supports_device(group, tensor.device):
        return None
    served, names = " and ".join(backends(group)), " and ".join(backends(group).values())
    hint = {"cuda": "backend='nccl'", "cpu": "backend='gloo'"}.get(tensor.device.type, "another backend")
    problem = f"{name} is on {tensor.device} and the {names} group moves tensors on {served}"
    return f"{problem}; move it there, or start the group with {hint}"


def device_of(group: dist.ProcessGroup) -> torch.device:
    """The device on which `group` exchanges small control tensors: the CPU if it can, since reading the result then stalls no
    GPU; else the current GPU."""
    served = backends(group)
    if "cpu" in served or not served:
        return CPU
    device = next(iter(served))
    return torch.device(device, getattr(torch, device).current_device())


def device_type_of(group: dist.ProcessGroup) -> str:
    """The device type of models that use `group`: GPUs where the group moves GPU tensors, else the CPU."""
    return next((device for device in backends(group) if device != "cpu"), "cpu")


def is_asynchronous(device: torch.device) -> bool:
    """Whether waiting for a transfer of this device's tensors returns at once and only makes the device's stream wait."""
    return device.type != "cpu"


def waits_on_stream(tensor: torch.Tensor) -> bool:
    """`is_asynchronous` for the device of `tensor`; faster, as it is called for every transfer."""
    return not tensor.is_cpu


def capturing(device: torch.device) -> bool:
    """Whether work on this device is being captured in a CUDA graph. False in a torch without CUDA."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds after which the backend gives up a transfer of this device's tensors; infinite if unknown."""
    options = getattr(group._get_backend(device), "options", None)
    return float(options._timeout.total_seconds()) if options is not None else math.inf
