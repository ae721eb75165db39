"""Checks the arguments of an attention call on every rank, and that all ranks agree on them, before anything is sent.

An error that one rank finds is part of the agreement that each call begins with, so all ranks raise the same error.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn._validation import as_finite_float, error_message, flag, short_repr
from ringattn.comm.consistency import Gradient, agree
from ringattn.comm.process_group import Group, cannot_move, capturing
from ringattn.comm.select import transport_supports
from ringattn.errors import InputError
from ringattn.execution.autograd import Inputs
from ringattn.execution.checks import as_strided_tensor, resolve_group
from ringattn.execution.first_order import outside_transforms, unsupported_transform
from ringattn.kernels.select import resolved, unsupported_reason
from ringattn.plan.plan import Plan

OPERATOR = "operator of kernel {!r} (where GPUs differ, give make_plan a kernel by name, such as 'flash')"


def checked_on_all_ranks(
    inputs: Inputs,
    plan: Plan,
    group: Group | None,
    scale: float | None,
    softcap: float | None,
    gradient: Gradient,
    strict: bool | str | None,
    check_finite: bool | str = False,
    return_lse: bool = False,
) -> tuple[dist.ProcessGroup | None, bool]:
    """Check that the arguments of all ranks fit the plan and each other.

    Returns the process group, and whether any of its ranks needs a gradient.
    """
    process_group, rank = resolve_group(plan, group)
    q, k, v, key_bias, sinks = inputs
    problem = error_message(lambda: _check_kinds(inputs, strict, check_finite, return_lse))
    problem = problem or _wrong_device(q, process_group) or _problem(q, k, v, plan, rank, key_bias, scale, sinks, softcap)
    if problem is None and check_finite:
        problem = _graph_cannot_check(check_finite) if capturing(q.device) else _not_finite(inputs, check_finite)
    if problem is not None:
        with outside_transforms():
            agree(process_group, {"call": "attention"}, problem, device=q.device if isinstance(q, Tensor) else None)
    fields = {
        "call": "attention",
        "plan": plan.digest,
        "batch": q.shape[0],
        "value head_dim": v.shape[-1],
        "dtype": q.dtype,
        "device type": q.device.type,
        OPERATOR.format(plan.kernel): resolved(
            *(plan.kernel, q.device, q.dtype, plan.head_dim, v.shape[-1], plan.heads),
            bias=key_bias is not None,
            softcap=softcap is not None,
        ),
        "scale": scale,
        "softcap": softcap,
        "key_bias": key_bias is not None and key_bias.ndim,
        "sinks": sinks is not None,
        "check_finite": check_finite,
        "strict": strict,
    }
    every_call = True if check_finite or isinstance(strict, str) else strict
    needed = agree(process_group, fields, every_call=every_call, device=q.device, details=plan.describe, gradient=gradient)
    return process_group, needed


def _check_kinds(inputs: Inputs, strict: object, check_finite: object, return_lse: object) -> None:
    """Raise `InputError` for arguments of the wrong type."""
    for name, value in zip(inputs._fields, inputs, strict=True):
        if value is not None or name in "qkv":
            as_strided_tensor(name, value)
    for name, option, other_types in (("strict", strict, str | None), ("check_finite", check_finite, str)):
        if not isinstance(option, other_types):
            flag(name, option, InputError)
    flag("return_lse", return_lse, InputError)
    if problem := unsupported_transform(*inputs):
        raise InputError(problem)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    rank: int,
    key_bias: Tensor | None,
    scale: float | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> str | None:
    """The error message for this rank's arguments, or None."""
    batch, rows, keys = q.shape[0] if q.ndim else "batch", plan.rows(rank), plan.kv_rows(rank)
    expected: list[tuple[str, Tensor | None, tuple[object, ...]]] = [
        ("q", q, (batch, rows, plan.heads, plan.head_dim)),
        ("k", k, (batch, keys, plan.kv_heads, plan.head_dim)),
        ("v", v, (batch, keys, plan.kv_heads, v.shape[-1] if v.ndim else "head_dim")),
        ("sinks", sinks, (plan.heads,)),
        ("key_bias", key_bias, (batch, keys) if key_bias is not None and key_bias.ndim == 2 else (batch, plan.kv_heads, keys)),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return _wrong_shape(name, tensor, shape, plan, rank)
        if tensor.device != q.device:
            return f"{name} is on {tensor.device} and q on {q.device}; move all tensors to this rank's device"
        if not tensor.is_floating_point():
            return f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor"
        if name in "qkv" and str(tensor.dtype) != f"torch.{plan.dtype}":
            return (
                f"{name} has dtype {tensor.dtype} and the plan is for {plan.dtype}; cast {name}, "
                f"or make the plan with dtype={str(tensor.dtype).removeprefix('torch.')!r}"
            )
    if scale is not None and not as_finite_float(scale):
        return f"scale={short_repr(scale)}: must be finite and not 0; leave it out for 1/sqrt(head_dim)"
    if softcap is not None and (as_finite_float(softcap) or 0) <= 0:
        return f"softcap={short_repr(softcap)}: must be finite and positive; leave it out for none"
    options = dict(bias=key_bias is not None, softcap=softcap is not None)
    return unsupported_reason(plan.kernel, q.device, q.dtype, plan.head_dim, v.shape[-1], **options)


def _graph_cannot_check(check_finite: bool | str) -> str:
    return (
        f"check_finite={short_repr(check_finite)}: a CUDA graph is being captured, in which numbers cannot be read; pass "
        "check_finite=False, and check inputs outside of the graph"
    )


def _wrong_device(q: Tensor, group: dist.ProcessGroup | None) -> str | None:
    return None if group is not None and transport_supports(group, q.device) else cannot_move(group, "q", q)


def _not_finite(inputs: Inputs, where: bool | str) -> str | None:
    """The error message for the first tensor with NaN or infinities: how many there are and where they begin; or None."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor) if name != "key_bias" else tensor.isnan() | tensor.isposinf()
        if bad.any():
            first, nans = tuple(bad.nonzero()[0].tolist()), int(tensor.isnan().sum())
            prefix = f"{where}: " if isinstance(where, str) else ""
            return f"{prefix}{name} holds {nans} NaN and {int(bad.sum()) - nans} infinities, the first at {first}"
    return None


def _wrong_shape(name: str, tensor: Tensor, shape: tuple[object, ...], plan: Plan, rank: int) -> str:
    actual = tuple(tensor.shape)
    problem = f"{name} has shape {actual}, the plan expects {shape} on rank {rank}"
    if len(actual) == 4 and len(shape) == 4 and (actual[0], actual[2], actual[1], actual[3]) == shape:
        return f"{problem}; heads and rows are swapped: pass {name}.transpose(1, 2)"
    if len(actual) > 1 and len(shape) > 1 and actual[1] != shape[1] and name in "qkv":
        layout = plan.layout if name == "q" else plan.layout.of_keys
        keys = ", keys=True" * (layout is not plan.layout)
        if actual[1] == layout.length:
            return f"{problem}; this is the whole sequence: take this rank's rows with shard({name}, plan{keys})"
        resident = f"rank {rank} holds {layout.rows(rank)} of {layout.length} rows"
        return f"{problem}; {resident}: cut the sequence with shard(x, plan{keys}) and the same plan"
    return f"{problem}; make the plan with the model's heads, kv_heads and head_dim"
