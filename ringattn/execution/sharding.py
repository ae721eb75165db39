"""Cuts a sequence into the rows of one rank, and gathers it again. Both follow the plan's layout and are differentiable.

`shard` needs no communication: every rank takes its own rows of the sequence. `unshard` gathers all shards on every rank; it is
meant for inspection, tests and checkpoints, since a model trains on shards throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn._validation import as_int, error_message, flag, instance, short_repr
from ringattn.comm.collectives import all_gather, all_reduce
from ringattn.comm.consistency import Gradient, agree
from ringattn.comm.process_group import Group, cannot_move, group_and_rank
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor, resolve_group
from ringattn.execution.joint_backward import gradient_of, in_backward
from ringattn.faults.watchdog import comm_errors
from ringattn.plan.plan import Plan
from ringattn.sequence.layout import Layout


def positions(plan: Plan, rank: int | None = None, *, keys: bool = False) -> Tensor:
    """Global position of each local row: int64 (rows,), of queries, or of `keys` where their layout differs.

    `rank` defaults to this process's rank in the default group.
    """
    return resident_positions(_layout(plan, keys), _rank(plan, rank))


def resident_positions(layout: Layout, rank: int) -> Tensor:
    """The positions that `rank` holds, in its order: int64 (rows,)."""
    spans = [torch.arange(s.start, s.start + s.length * s.stride, s.stride) for s in layout.shards[rank]]
    return torch.cat([torch.empty(0, dtype=torch.int64), *spans])


def sequence_order(layout: Layout) -> Tensor:
    """The indices that sort the concatenated shards into the order of the sequence: int64 (length,)."""
    return torch.cat([resident_positions(layout, rank) for rank in range(layout.world)]).argsort()


def shard(x: Tensor, plan: Plan, *, dim: int = 1, rank: int | None = None, keys: bool = False) -> Tensor:
    """The rows of `x` along `dim` that `rank` holds. x: (..., seq_len at dim, ...), the same on every rank; `keys`: kv_len.

    Raises `InputError` when `x` has another length than the plan. Gradients flow back to the rows taken.
    """
    layout = _layout(plan, keys)
    dim = as_int("dim", dim, InputError)
    if not -as_strided_tensor("x", x).ndim <= dim < x.ndim or x.shape[dim] != layout.length:
        raise InputError(
            f"shard(x): the plan is for {layout.length} positions and x of shape {tuple(x.shape)} does not have as many along "
            f"dim {short_repr(dim)}; pass the whole sequence, or make a plan for its length"
        )
    return x.index_select(dim, positions(plan, rank, keys=keys).to(x.device) - layout.first)


def unshard(x: Tensor, plan: Plan, *, dim: int = 1, group: Group | None = None, keys: bool = False) -> Tensor:
    """Gather the whole sequence on every rank, in order. x: (..., rows at dim, ...), this rank's shard of queries or of `keys`.

    In backward the gradients of the whole sequence are summed over ranks and sharded again, so a loss that every rank computes
    on the whole sequence counts `world` times: divide it by `world`, or compute the loss on shards.
    """
    process_group, rank = resolve_group(plan, group)
    problem, arguments = error_message(lambda: _check_shard(x, plan, dim, keys, process_group, rank)), {}
    if problem is None:
        others = [n for d, n in enumerate(x.shape) if d != dim % x.ndim]
        arguments = {"plan": plan.digest, "keys": keys, "dtype": x.dtype, "shape beside the rows": others, "dim": dim}
    device = x.device if isinstance(x, Tensor) else None
    gradient = gradient_of(x)
    fields = {"call": "unshard"} | arguments
    if (
        agree(process_group, fields, problem, device=device, details=plan.describe, gradient=gradient)
        and gradient == Gradient.NONE
    ):
        x = in_backward(x)
    gathered: Tensor = _Unshard.apply(x, plan, int(dim), process_group, rank, keys)
    return gathered


def _check_shard(x: Tensor, plan: Plan, dim: int, keys: bool, group: dist.ProcessGroup | None, rank: int) -> None:
    rows, dim = _layout(plan, keys).rows(rank), as_int("dim", dim, InputError)
    if not -as_strided_tensor("x", x).ndim <= dim < x.ndim or x.shape[dim] != rows:
        raise InputError(
            f"unshard(x): x of shape {tuple(x.shape)} does not have the {rows} rows of rank {rank} along dim {short_repr(dim)}"
        )
    if problem := cannot_move(group, "x", x):
        raise InputError(problem)


def _layout(plan: Plan, keys: bool) -> Layout:
    instance("plan", plan, Plan, InputError, "make one with make_plan(...)")
    flag("keys", keys, InputError)
    return plan.layout.of_keys if keys else plan.layout


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, dim: int, group: dist.ProcessGroup | None, rank: int, keys: bool) -> Tensor:
        ctx.plan, ctx.dim, ctx.group, ctx.rank, ctx.keys = plan, dim, group, rank, keys
        layout = _layout(plan, keys)
        shards = torch.cat(_gather(x.movedim(dim, 0).contiguous(), layout, group))
        return shards[sequence_order(layout).to(x.device)].movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        own: Tensor = _SumAndShard.apply(grad, ctx.plan, ctx.dim, ctx.group, ctx.rank, ctx.keys)
        return own, None, None, None, None, None


class _SumAndShard(torch.autograd.Function):
    """Backward of `_Unshard`, whose own backward is `_Unshard`: both are linear, so all higher derivatives exist."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *arguments: Any) -> Tensor:
        plan, dim, group, rank, keys = ctx.arguments = arguments
        grad = grad.contiguous().clone()
        if group is not None:
            with comm_errors("gathering gradients", f"rank {rank}: backward of unshard failed"):
                all_reduce(grad, group)
        return shard(grad, plan, dim=dim, rank=rank, keys=keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (_Unshard.apply(*grads, *ctx.arguments), *[None] * len(ctx.arguments))


def _gather(rows: Tensor, layout: Layout, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's rows (dim 0). Shards may differ in length: all are padded to the longest for one collective."""
    if group is None:
        return [rows]
    longest = max(layout.rows(r) for r in range(layout.world))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(layout.world)]
    with comm_errors("gathering a sequence", f"rank {dist.get_rank(group)}: unshard failed"):
        all_gather(parts, padded, group)
    return [part[: layout.rows(r)] for r, part in enumerate(parts)]


def _rank(plan: Plan, rank: int | None) -> int:
    if rank is None:
        return group_and_rank(None, plan.world)[1]
    rank = as_int("rank", rank, InputError)
    if not 0 <= rank < plan.world:
        raise InputError(f"rank={short_repr(rank)}: the plan has ranks 0 to {plan.world - 1}")
    return rank
