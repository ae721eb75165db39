"""Registers `attention` as an operator for torch.compile, which neither traces into it nor breaks the graph at it.

Eager mode keeps its autograd function; the operator wraps the same two functions, `run_forward` and `run_backward`. Eager mode
uses the operator only under selective checkpointing (`selective`), since it hosts a single rank, while simulation hosts all of
them, and since it has to return the inputs kept on this rank as one tensor of known size (`kept`), a copy that eager mode does
not make.

An operator takes tensors, numbers and text. So a plan is passed as its digest and a group by its name; `graph_arguments`
determines both while the graph is traced, and the graph is valid for this plan and this group only. Plans passed this way stay
for the life of the process, as do the graphs that name them: torch's recompile limit bounds their number, and backward may run
after its caller has dropped the plan. The rank is an argument because the size of `kept` depends on it, and compiled code is
cached on disk by its arguments.

Everything that depends on tensors, ranks and peers happens when the operator runs: arguments are checked and agreed on in each
call, and errors are those of eager mode. The fake kernel returns shapes even for a call that will raise.

For backward a compiled call saves the same as an eager one: q, k, v, out and lse, or `kept` in place of q, k and v. Within
activation checkpointing all of it is computed, and sent, again.

Not guaranteed: the order of attentions that do not depend on each other within one graph. The compiler may change it, and ranks
on which it does so differently would exchange the wrong tensors. In a transformer each depends on the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ringattn.comm.consistency import Gradient
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.comm.select import transport_for
from ringattn.comm.wire_format import Spec, pack, unpack
from ringattn.errors import LaunchError, MismatchError, PlanError
from ringattn.execution.arguments import checked_on_all_ranks
from ringattn.execution.autograd import Inputs, options_for, resident_items, run_backward, run_forward
from ringattn.execution.first_order import differentiable_once
from ringattn.execution.shapes import InputSizes, Shapes
from ringattn.kernels.lse import accum_dtype
from ringattn.plan.plan import Plan
from ringattn.schedule.program import Item

PLAN_ARGUMENTS = "str plan, str group, int rank, float? scale, float? softcap"
FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? sinks, {PLAN_ARGUMENTS}, bool gradient, str? strict) "
    "-> (Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dout, Tensor? q, Tensor? k, Tensor? v, Tensor? key_bias, Tensor? sinks, Tensor out, Tensor lse, Tensor kept, "
    f"{PLAN_ARGUMENTS}) -> Tensor[]"
)

# `mode="reduce-overhead"` captures CUDA graphs, which can repeat neither the agreement that a call begins with nor what the
# host does between transfers. With this tag they end before these operators and begin after them; torch has it from 2.8 on.
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
OUTSIDE_GRAPHS: dict[str, Any] = {} if _unsafe is None else {"tags": (_unsafe,)}

NO_RANK = -1  # of a process outside of a group

_plans: dict[str, Plan] = {}


def graph_arguments(plan: Plan, group: Group | None) -> tuple[str, str, int]:
    """The values that represent `plan` and `group` in a graph, and this process's rank. Errors are raised when it runs."""
    _plans[plan.digest] = plan
    try:
        process_group, rank = group_and_rank(group, plan.world)
    except LaunchError:
        return plan.digest, "", NO_RANK
    except MismatchError as error:
        return plan.digest, "" if group is None else f"!{error}", NO_RANK
    return plan.digest, "" if group is None or process_group is None else process_group.group_name, rank


# As torch.compiler.assume_constant_result does, which would import the compiler (seconds) wherever ringattn is imported. Dynamo
# then runs the function while it traces, and guards on the identity of its arguments.
graph_arguments._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    plan: str,
    group: str,
    rank: int,
    scale: float | None,
    softcap: float | None,
    gradient: bool,
    strict: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and `kept`, after all ranks have agreed on the arguments."""
    inputs, known_plan = Inputs(q, k, v, key_bias, sinks), _plan(plan)
    strict_option = {"True": True, "False": False}.get(strict or "", strict)
    # The graph has a backward pass or not: a rank without one cannot take part in that of others.
    gradient_state = Gradient.NEEDED if gradient else Gradient.OFF
    process_group, _ = checked_on_all_ranks(inputs, known_plan, _group(group), scale, softcap, gradient_state, strict_option)
    if rank != (actual := 0 if process_group is None else dist.get_rank(process_group)):
        raise LaunchError(f"compiled as rank {rank}, run as rank {actual}: call torch.compiler.reset() after joining a group")
    keep_inputs = known_plan.reuse_inputs and gradient
    with torch.autocast(q.device.type, enabled=False):
        (out, lse), (resident,) = run_forward(
            [inputs], known_plan, options_for(known_plan, scale, softcap), transport_for(process_group), keep_inputs=keep_inputs
        )
    specs = _kept_specs(known_plan, rank, out, key_bias) if keep_inputs else {}
    tensors = [tensor for item in specs for tensor in resident[item]]
    kept = pack(tensors, [spec for item_specs in specs.values() for spec in item_specs]) if tensors else _bytes(out, 0)
    return out.contiguous(), lse.contiguous(), kept


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    plan: str,
    group: str,
    rank: int,
    scale: float | None,
    softcap: float | None,
    gradient: bool,
    strict: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    known_plan = _plan(plan)
    fits = q.ndim == 4 and q.shape[2] == known_plan.heads
    batch, rows = (q.shape[0], q.shape[1]) if fits else (q.shape[0] if q.ndim else 1, known_plan.rows(max(rank, 0)))
    out = q.new_empty(batch, rows, known_plan.heads, v.shape[-1] if v.ndim else known_plan.head_dim)
    lse = q.new_empty(batch, known_plan.heads, rows, dtype=accum_dtype(q.dtype))
    keep_inputs = known_plan.reuse_inputs and gradient and rank != NO_RANK and (key_bias is None or key_bias.ndim in (2, 3))
    specs = _kept_specs(known_plan, rank, out, key_bias) if keep_inputs else {}
    return out, lse, _bytes(out, sum(spec.nbytes for item_specs in specs.values() for spec in item_specs))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_bias, sinks, plan, *where = inputs
    own = (None, None, None) if _plan(plan).reuse_inputs else (q, k, v)
    ctx.save_for_backward(*own, key_bias, sinks, *output)
    ctx.where = (plan, *where[:-2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dout: Tensor, *others: Tensor) -> tuple[Any, ...]:
    *inputs, out, lse, kept = ctx.saved_tensors
    dq, dk, dv, *more = _backward(dout, *inputs, out, lse, kept, *ctx.where)
    present = [tensor is not None for tensor in inputs[3:]]
    dbias, dsinks = (more.pop(0) if is_present else None for is_present in present)
    return (*differentiable_once([dq, dk, dv, dbias, dsinks], dout, out), *[None] * (len(ctx.where) + 2))


def _run_backward(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    plan: str,
    group: str,
    rank: int,
    scale: float | None,
    softcap: float | None,
) -> list[Tensor]:
    known_plan = _plan(plan)
    inputs = _inputs_or_shapes(q, k, v, known_plan, rank, out, key_bias, sinks)
    process_group, _ = group_and_rank(_group(group), known_plan.world)
    specs = _kept_specs(known_plan, rank, out, key_bias) if q is None else {}
    tensors = unpack(kept, [spec for item_specs in specs.values() for spec in item_specs])
    sizes = {item: len(item_specs) for item, item_specs in specs.items()}
    options = options_for(known_plan, scale, softcap)
    with torch.autocast(dout.device.type, enabled=False):
        (grads,) = run_backward(
            [inputs], [out, lse], [dout], [sizes], iter(tensors), known_plan, options, transport_for(process_group)
        )
    return [grad.contiguous() for grad in grads if grad is not None]


_backward = torch.library.custom_op(
    "ringattn::attention_backward", _run_backward, mutates_args=(), schema=BACKWARD, **OUTSIDE_GRAPHS
)


@_backward.register_fake
def _fake_backward(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    plan: str,
    group: str,
    rank: int,
    scale: float | None,
    softcap: float | None,
) -> list[Tensor]:
    inputs = _inputs_or_shapes(q, k, v, _plan(plan), rank, out, key_bias, sinks)
    return [t.new_empty(t.shape) for t in inputs if t is not None]


def _inputs_or_shapes(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    plan: Plan,
    rank: int,
    out: Tensor,
    key_bias: Tensor | None,
    sinks: Tensor | None = None,
) -> Inputs:
    """The inputs of the call that returned `out`; inputs that were not saved have a shape and no memory."""
    if q is None or k is None or v is None:
        (batch, rows, _, dim), keys, shape_only = out.shape, plan.kv_rows(rank), out.new_zeros(())
        q = shape_only.expand(batch, rows, plan.heads, plan.head_dim)
        k, v = (shape_only.expand(batch, keys, plan.kv_heads, n) for n in (plan.head_dim, dim))
    return Inputs(q, k, v, key_bias, sinks)


def _kept_specs(plan: Plan, rank: int, out: Tensor, key_bias: Tensor | None) -> dict[Item, Sequence[Spec]]:
    """The tensors that `kept` packs, in order. Sizes may be symbolic, which no cache can hold."""
    bias_heads = 0 if key_bias is None else 1 if key_bias.ndim == 2 else key_bias.shape[1]
    shapes = Shapes(plan, InputSizes(out.shape[0], out.shape[-1], out.dtype, bias_heads), backward=False)
    return {item: shapes.specs(item) for item in resident_items(plan, rank)}


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


def _plan(digest: str) -> Plan:
    if digest not in _plans:
        raise PlanError(f"plan {digest} is not known in this process: a compiled graph runs only in the process that traced it")
    return _plans[digest]


def _group(name: str) -> dist.ProcessGroup | None:
    if name.startswith("!"):
        raise MismatchError(name[1:])
    registry: Any = distributed_c10d
    return cast(dist.ProcessGroup, registry._resolve_process_group(name)) if name else None


attention_operator = torch.library.custom_op(
    "ringattn::attention", _run_forward, mutates_args=(), schema=FORWARD, **OUTSIDE_GRAPHS
)
attention_operator.register_fake(_fake_forward)
attention_operator.register_autograd(_differentiate, setup_context=_save_for_backward)
