"""Computes attention with a learned bias for each bucket of distances (T5's relative position bias), exact over shards.

softmax(q k^T * scale + table[bucket(position of key - position of query)]) v

A bucket is a run of distances, so the pairs of queries and keys that share a bias form a `Band`, and its bias is one number for
all keys: `key_bias`. Attention over each band gives a partial result; partial results merge by log-sum-exp, like those of
ranks. In backward each band gets the log-sum-exp and the out of the whole row, so its probabilities, and with them the
gradients of q, k, v and of its bias, are exact. No tensor of rows x keys is made; the table is not communicated.

Most bands are a few distances wide: they move only the rows at the ends of shards. The bias: Raffel et al. 2020,
https://arxiv.org/abs/1910.10683 section 2.1. The merge: https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.comm.consistency import Gradient, agree
from ringattn.comm.process_group import Group
from ringattn.comm.select import transport_for
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.attention import cast_dtype
from ringattn.execution.autograd import Inputs, run_backward, run_forward, without_autocast
from ringattn.execution.checks import resolve_group
from ringattn.execution.first_order import differentiable_once, unsupported_gradient, unsupported_transform
from ringattn.execution.joint_backward import gradient_of, in_backward
from ringattn.kernels import Options
from ringattn.kernels.lse import Partial, accum_dtype, empty_partial, merge_
from ringattn.plan.plan import Plan
from ringattn.sequence.mask import END, Band, Mask, Rect


class Bucket(NamedTuple):
    """Distances (position of the key minus that of the query) left .. right, which share one row of the table."""

    row: int
    left: int
    right: int

    @property
    def mask(self) -> Mask:
        """The pairs of a bucket; plans ignore distances beyond the sequence."""
        return Mask(f"distances({self.left}..{self.right})", (Rect(0, END, 0, END, Band(self.left, self.right)),))


def consecutive_buckets(indices: Sequence[int], counts: Sequence[int], first: int) -> tuple[Bucket, ...]:
    """Makes consecutive buckets of `counts` distances each, starting at `first`."""
    buckets = []
    for index, count in zip(indices, counts, strict=True):
        buckets.append(Bucket(index, first, first + count - 1))
        first += count
    return tuple(buckets)


class BiasedPlan(NamedTuple):
    """A bucket of distances and the plan for its band."""

    bucket: Bucket
    plan: Plan


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    plans: Sequence[BiasedPlan],
    *,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
    group: Group | None = None,
) -> Tensor:
    """Computes attention with table[bucket of the distance] added to the logits; collective over `group`.

    Args:
        q: (batch, rows, heads, head_dim), in the plans' dtype, this rank's rows.
        k, v: as q, with kv_heads.
        table: (buckets, kv_heads), float; the same on every rank. Its gradient is this rank's share, to be summed over ranks.
        plans: of disjoint buckets; a pair of query and key in no bucket is hidden.
        key_bias: (batch, rows), 0 or -inf where a key is hidden; no gradient flows through it.
        scale: of the logits; T5's is 1.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.

    Returns:
        (batch, rows, heads, head_dim) in q's dtype. A row that sees no key is 0.

    Raises:
        InputError: shapes do not fit, or the call is being compiled. Raised on every rank.
        MismatchError: ranks passed different plans or shapes.
    """
    q, k, v = (x.to(cast_dtype(x)) for x in (q, k, v))
    transport, joins_backward = _checked(q, k, v, table, plans, key_bias, scale, group)
    if joins_backward:
        q = in_backward(q)
    with without_autocast(q.device.type):
        out: Tensor = _Relative.apply(q, k, v, table, key_bias, tuple(plans), Options(float(scale)), transport)
    return out


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    plans: Sequence[BiasedPlan],
    key_bias: Tensor | None,
    scale: float,
    group: Group | None,
) -> tuple[Transport, bool]:
    """Checks arguments on all ranks; returns the transport, and whether q must join backward for the sake of other ranks."""
    process_group, rank = resolve_group(plans[0].plan, group)
    gradient = gradient_of(q, k, v, table)
    fields = {
        "call": "attention with a relative position bias",
        "plans": ", ".join(plan.digest for _, plan in plans),
        "batch": q.shape[0],
        "dtype": q.dtype,
        "scale": scale,
        "key_bias": key_bias is not None,
        "table": tuple(table.shape),
    }
    problem = _problem(q, k, v, table, plans, rank, key_bias)
    needed = agree(process_group, fields, problem, device=q.device, gradient=gradient)
    return transport_for(process_group), needed and gradient == Gradient.NONE


def _problem(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, plans: Sequence[BiasedPlan], rank: int, key_bias: Tensor | None
) -> str | None:
    """The first problem of this rank's arguments, or None."""
    if torch.compiler.is_compiling():
        return "attention with a relative position bias cannot be compiled; leave torch.compile out for this model"
    if problem := unsupported_transform(q, k, v, table):
        return problem
    plan = plans[0].plan
    rows = plan.rows(rank)
    expected = {
        "q": (q, (q.shape[0], rows, plan.heads, plan.head_dim)),
        "k": (k, (q.shape[0], rows, plan.kv_heads, plan.head_dim)),
        "v": (v, (q.shape[0], rows, plan.kv_heads, v.shape[-1])),
    } | ({} if key_bias is None else {"key_bias": (key_bias, (q.shape[0], rows))})
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            return f"{name} has shape {tuple(tensor.shape)}, the plans expect {shape} on rank {rank}"
    if table.ndim != 2 or table.shape[1] != plan.kv_heads or table.shape[0] <= max(bucket.row for bucket, _ in plans):
        return f"table has shape {tuple(table.shape)}; it needs a row for each bucket and {plan.kv_heads} columns"
    if any(plan.reuse_inputs for _, plan in plans):
        return "plans in which inputs stay away from their owner (Ulysses) are not for single buckets; use schedule='ring'"
    return None


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        key_bias: Tensor | None,
        plans: tuple[BiasedPlan, ...],
        options: Options,
        transport: Transport,
    ) -> Tensor:
        batch, rows, heads, _ = q.shape
        total = empty_partial((batch, heads, rows), v.shape[-1], accum_dtype(q.dtype), q.device)
        for bucket, plan in plans:
            inputs = Inputs(q, k, v, _bias(table, bucket, key_bias, k))
            (out, lse), _ = run_forward([inputs], plan, options, transport, keep_inputs=False)
            merge_(total, Partial(out.transpose(1, 2), lse))
        out, lse = total.out.transpose(1, 2).to(q.dtype), total.lse
        ctx.plans, ctx.options, ctx.transport = plans, options, transport
        ctx.save_for_backward(q, k, v, table, key_bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if problem := unsupported_gradient(*grads):
            raise InputError(problem)
        q, k, v, table, key_bias, out, lse = ctx.saved_tensors
        (dout,) = grads
        with torch.no_grad(), without_autocast(q.device.type):
            sums = [torch.zeros_like(x, dtype=accum_dtype(x.dtype)) for x in (q, k, v, table)]
            for bucket, plan in ctx.plans:
                inputs = Inputs(q, k, v, _bias(table, bucket, key_bias, k))
                # With the log-sum-exp and out of the whole row, the band's probabilities are its share of the whole row.
                (band_grads,) = run_backward([inputs], [out, lse], [dout], [{}], iter(()), plan, ctx.options, ctx.transport)
                for total, grad in zip(sums, band_grads[:3], strict=False):
                    if grad is not None:
                        total += grad
                if band_grads[3] is not None:  # of the bias, which is the same for all keys and sequences
                    sums[3][bucket.row] += band_grads[3].sum((0, 2))
            totals = [total.to(x.dtype) for total, x in zip(sums, (q, k, v, table), strict=True)]
        return (*differentiable_once(totals, out, dout), None, None, None, None)


def _bias(table: Tensor, bucket: Bucket, key_bias: Tensor | None, k: Tensor) -> Tensor:
    """(batch, kv_heads, keys): the bucket's bias, and -inf where a key is hidden."""
    bias = table[bucket.row].to(accum_dtype(k.dtype))[:, None].expand(k.shape[0], -1, k.shape[1])
    return bias.contiguous() if key_bias is None else bias + key_bias[:, None].to(bias)


def plans_for(buckets: Sequence[Bucket], make: Callable[[Mask], Plan]) -> tuple[BiasedPlan, ...]:
    """Plans all buckets, with a function that makes the plan for a mask."""
    return tuple(BiasedPlan(bucket, make(bucket.mask)) for bucket in buckets)
