"""Validates arguments of collective calls; all ranks raise together, including a rank without a plan.

A rank that raises alone leaves the others waiting for it until their deadline. So an error that a rank finds in its arguments
is part of the agreement that the call begins with, and all ranks raise it.
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

HINTS = {Plan: "make one with make_plan(...)", Layout: "give the layout of the rows, as plan.layout"}


def resolve_group(
    what: Plan | Layout, group: Group | None, kind: type[Plan] | type[Layout] = Plan
) -> tuple[dist.ProcessGroup | None, int]:
    """The process group of a call with this plan or layout and the rank in it, as `group_and_rank`.

    A rank that has no plan, or no group for it, takes part in the agreement of the others: all ranks raise an error that names
    it.
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
    """`error` with the message that all ranks of `group` have agreed on."""
    try:
        agree(_group_of_others(group), {}, str(error))
    except InputError as agreed:
        # An error of the group that all ranks have needs no rank to be named.
        return (
            InputError(str(agreed))
            if isinstance(error, InputError)
            else type(error)(str(agreed).removeprefix("on every rank: "))
        )
    return error


def as_strided_tensor(name: str, value: object) -> Tensor:
    """`value` if it is a dense tensor; raises `InputError` for anything else."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name}={short_repr(value)}; must be a tensor")
    if value.is_nested or value.layout != torch.strided:
        raise InputError(f"{name} is a tensor of layout {value.layout}; make it dense, as with {name}.to_dense()")
    return value


def check_tokens(name: str, x: Tensor, stop: int, ignored: int | None = None) -> None:
    """Raise `InputError` unless all tokens of `x` are in [0, stop). Only on a CPU: elsewhere reading them would stall."""
    if x.device.type == "cpu" and x.numel():
        tokens = x if ignored is None else x.where(x != ignored, 0)
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0 or largest >= stop:
            raise InputError(f"{name} holds {largest if largest >= stop else smallest}; there are {stop} tokens, from 0 on")


def _check(what: object, group: object, kind: type[Plan] | type[Layout]) -> None:
    instance(kind.__name__.lower(), what, kind, InputError, HINTS[kind])
    check_group(group)


def check_group(group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup | DeviceMesh):
        raise InputError(f"group={short_repr(group)}; give a process group, a 1-D DeviceMesh, or None for the default group")


def _group_of_others(group: object) -> dist.ProcessGroup | None:
    """The group in which the other ranks may be waiting."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        return group.get_group()
    return group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
