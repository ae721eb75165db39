"""What callers bring to a call: tensors that are tensors, and ranks that all come to it, also one that brings no plan.

A rank that raises by itself leaves the others waiting for it until their deadline. So whatever a rank finds wrong with its own
arguments goes into the agreement that the call begins with, and all raise together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn._validation import error_message, instance, short_repr
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError, MismatchError, RingAttnError
from ringattn.plan.plan import Plan
from ringattn.sequence.layout import Layout

CURES = {Plan: "make one with make_plan(...)", Layout: "give the layout of the rows, as plan.layout"}


def resolve_group(
    what: Plan | Layout, group: Group | None, kind: type[Plan] | type[Layout] = Plan
) -> tuple[dist.ProcessGroup | None, int]:
    """The process group of a call with this plan or layout and the rank in it, as `group_and_rank`.

    A rank that has no plan, or no group for it, takes part in the agreement of the others: all raise, and name it.
    """
    error: RingAttnError | None = None
    problem = error_message(lambda: _check(what, group, kind))
    if problem is None:
        try:
            return group_and_rank(group, what.world)
        except MismatchError as mismatch:
            error = mismatch
    raise agreed_error(error or InputError(problem), group)


def agreed_error(error: RingAttnError, group: object) -> RingAttnError:
    """`error`, in the words in which all ranks of `group` now hear of it."""
    try:
        agree(_somewhere(group), {}, str(error))
    except InputError as heard:
        # What all ranks find wrong with a group needs no rank to be named.
        return (
            InputError(str(heard)) if isinstance(error, InputError) else type(error)(str(heard).removeprefix("on every rank: "))
        )
    return error


def as_strided_tensor(name: str, value: object) -> Tensor:
    """A tensor of the ordinary kind; raises `InputError` for anything else."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name}={short_repr(value)}; must be a tensor")
    if value.is_nested or value.layout != torch.strided:
        raise InputError(f"{name} is a tensor of layout {value.layout}; make it dense, as with {name}.to_dense()")
    return value


def whole_numbers(name: str, x: Tensor, stop: int, ignored: int | None = None) -> None:
    """Raise `InputError` unless all of `x` are from 0 to below `stop`. Only on a CPU: elsewhere reading them would stall."""
    if x.device.type == "cpu" and x.numel():
        counted = x if ignored is None else x.where(x != ignored, 0)
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or most >= stop:
            raise InputError(f"{name} holds {most if most >= stop else least}; there are {stop} tokens, from 0 on")


def _check(what: object, group: object, kind: type[Plan] | type[Layout]) -> None:
    instance(kind.__name__.lower(), what, kind, InputError, CURES[kind])
    check_group(group)


def check_group(group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup | DeviceMesh):
        raise InputError(f"group={short_repr(group)}; give a process group, a 1-D DeviceMesh, or None for the default group")


def _somewhere(group: object) -> dist.ProcessGroup | None:
    """Where the other ranks may be waiting."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        return group.get_group()
    return group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
