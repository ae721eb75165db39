"""Computes exact attention over a sequence that is sharded over ranks: the public function `attention`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from ringattn.comm.consistency import Gradient
from ringattn.comm.process_group import Group
from ringattn.comm.select import transport_for
from ringattn.errors import InputError
from ringattn.execution.arguments import checked_on_all_ranks
from ringattn.execution.autograd import Inputs, attend, options_for
from ringattn.execution.custom_op import attention_operator, graph_arguments
from ringattn.execution.joint_backward import gradient_of, in_backward
from ringattn.execution.selective import outside_dispatch_modes, under_selective_checkpointing
from ringattn.plan.plan import Plan


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    group: Group | None = None,
    return_lse: Literal[False] = False,
    check_finite: bool | str = False,
    strict: bool | str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    group: Group | None = None,
    return_lse: Literal[True],
    check_finite: bool | str = False,
    strict: bool | str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    group: Group | None = None,
    return_lse: bool = False,
    check_finite: bool | str = False,
    strict: bool | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute exact attention over a sequence that is sharded over ranks; each rank passes its rows of the plan.

    Args:
        q: (batch, rows, heads, head_dim), in the plan's dtype; rows as `plan.rows(rank)`, positions as `positions(plan)`.
        k: (batch, keys, kv_heads, head_dim); as many keys as rows, unless the plan says otherwise (`plan.kv_rows(rank)`).
        v: (batch, keys, kv_heads, value head_dim).
        plan: from `make_plan`; the same on every rank.
        key_bias: (batch, keys) or (batch, kv_heads, keys), float; added to the scaled logits of these keys; -inf hides a key.
        scale: of the logits; 1 / sqrt(head_dim) by default.
        sinks: (heads,); one more logit per head, without a value, that takes part in the softmax, as in GPT-OSS.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.
        return_lse: also return the log-sum-exp of each row's logits. No gradient flows through it.
        check_finite: raise if a tensor holds NaN or infinities (-inf in key_bias is allowed). A text, such as "layer 3", is
            part of the error. Reads all input once; not under torch.compile.
        strict: whether ranks agree on every call, and so on the order of calls, before anything is sent. False: only on the
            first call of each kind, after which it costs nothing, and ranks that make different known calls are found by the
            deadline or not at all. None: on every call where tensors are on the CPU; on GPUs, which would stall, as False.
            A text, such as "layer 3": on every call, and on the text, which also detects layers in another order.
            With gradients on and none needed, they agree on every call in any case: use torch.no_grad().
            A CUDA graph can capture a call that was made before and on which ranks need not agree again; other calls raise.

    Returns:
        out: (batch, rows, heads, head_dim) in q's dtype; with `return_lse` also lse: (batch, heads, rows), fp32 (fp64 for fp64
        input), natural log. A row that attends to no key has out 0, lse -inf and zero gradients.

    Differentiable in q, k, v, key_bias and sinks, once: a second derivative raises `InputError`. If any rank needs a gradient,
    out requires one on every rank, and every rank has to call backward. Under autocast, q, k and v are cast to the autocast
    dtype, as SDPA does, and the plan must be for that dtype.

    Raises:
        InputError: a tensor does not fit the plan. Raised on every rank, before anything else is sent. (Rows of another rank
            are detected only if their number differs, not by their values.)
        MismatchError: ranks have different plans, shapes, dtypes or options, or one skipped a call, or has gradients off where
            others need them. Raised on every rank. See `strict`, and `comm.consistency`.
        CommError: a transfer failed.
        LaunchError: the plan needs a process group and there is none.

    Method: blockwise attention merged by log-sum-exp, https://arxiv.org/abs/2310.01889 (ring) and
    https://arxiv.org/abs/2412.20501 (TokenRing).
    """
    q, k, v = _autocast(q, k, v)
    inputs = Inputs(q, k, v, key_bias, sinks)
    gradient = gradient_of(*inputs)
    if torch.compiler.is_compiling():
        if check_finite:
            raise InputError(
                "check_finite needs the numbers, which a compiled graph does not have; leave it out of compiled code"
            )
        named = None if strict is None else str(strict)  # an operator takes no argument of either type
        out, lse, _ = attention_operator(
            *inputs, *graph_arguments(plan, group), scale, softcap, gradient == Gradient.NEEDED, named
        )
    else:
        as_operator = under_selective_checkpointing()
        with outside_dispatch_modes() if as_operator else nullcontext():
            process_group, needed = checked_on_all_ranks(
                inputs, plan, group, scale, softcap, gradient, strict, check_finite, return_lse
            )
        if needed and gradient == Gradient.NONE:
            inputs = inputs._replace(q=in_backward(q))
        if as_operator:
            out, lse, _ = attention_operator(*inputs, *graph_arguments(plan, group), scale, softcap, needed, "False")
            return (out, lse) if return_lse else out
        ((out, lse),) = attend([inputs], plan, options_for(plan, scale, softcap), transport_for(process_group))
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(cast_dtype(t)) if isinstance(t, Tensor) else t for t in tensors)


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `attention` computes `x`: autocast's where that is on, as in SDPA, else its own. Plans need it."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.is_floating_point() and x.dtype != torch.float64 else x.dtype
