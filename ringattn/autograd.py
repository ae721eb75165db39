"""Attention over all shards as one differentiable function.

Forward runs the plan's forward program and keeps only this rank's q, k, v, out and lse; backward runs the plan's backward
program, which may be another schedule. Sinks need no schedule at all: they join at the owner, after all partials have been
merged.

`attend` is told which ranks it hosts by its transport: one, as a member of a process group, or all of them when simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.comm.transport import Transport
from ringattn.engine import run
from ringattn.kernels import Options
from ringattn.plan import Plan
from ringattn.work import Backward, Forward


class Inputs(NamedTuple):
    """One rank's tensors as the public interface has them."""

    q: Tensor  # (batch, rows, heads, head_dim)
    k: Tensor  # (batch, rows, kv_heads, head_dim)
    v: Tensor  # (batch, rows, kv_heads, head_dim)
    key_bias: Tensor | None = None  # (batch, 1 or kv_heads, rows)
    sinks: Tensor | None = None  # (heads,)


def attend(inputs: Sequence[Inputs], plan: Plan, options: Options, transport: Transport) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) for each rank that `transport` hosts, in order; see `attention` for shapes."""
    flat = [tensor for rank_inputs in inputs for tensor in rank_inputs]
    with torch.autocast(inputs[0].q.device.type, enabled=False):
        results = _Attend.apply(plan, options, transport, *flat)
    return list(zip(results[::2], results[1::2], strict=True))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, options: Options, transport: Transport, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _by_rank(flat)
        works = [Forward(plan, rank, options, **_engine_order(i)) for rank, i in zip(transport.ranks, inputs, strict=True)]
        runs = [
            run(plan.program(rank, backward=False), work, port)
            for rank, work, port in zip(transport.ranks, works, transport.ports("forward"), strict=True)
        ]
        results: list[Tensor] = []
        for i, work, gathered in zip(inputs, works, transport.drive(runs), strict=True):
            out, lse = work.result(gathered)
            if i.sinks is not None:
                out, lse = _with_sinks(out, lse, i.sinks)
            results += [out.transpose(1, 2), lse]
        ctx.plan, ctx.options, ctx.transport = plan, options, transport
        ctx.save_for_backward(*flat, *results)
        ctx.mark_non_differentiable(*results[1::2])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, transport = ctx.plan, ctx.transport
        count = len(Inputs._fields) * len(transport.ranks)
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
        inputs, results = _by_rank(saved[:count]), saved[count:]
        works, deltas = [], []
        for rank, i, dout, out, lse in zip(transport.ranks, inputs, grads[::2], results[::2], results[1::2], strict=True):
            delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)  # (batch, heads, rows)
            deltas.append(delta)
            works.append(Backward(plan, rank, ctx.options, **_engine_order(i), dout=dout.transpose(1, 2), lse=lse, delta=delta))
        runs = [
            run(plan.program(rank, backward=True), work, port)
            for rank, work, port in zip(transport.ranks, works, transport.ports("backward"), strict=True)
        ]
        flat: list[Tensor | None] = []
        for i, work, gathered, delta, lse in zip(inputs, works, transport.drive(runs), deltas, results[1::2], strict=True):
            dq, dk, dv, dbias = work.result(gathered)
            dsinks = None if i.sinks is None else _sink_grad(i.sinks, lse, delta)
            flat += [dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias, dsinks]
        return (None, None, None, *flat)


def _by_rank(flat: Sequence[Tensor | None]) -> list[Inputs]:
    count = len(Inputs._fields)
    return [Inputs(*flat[n : n + count]) for n in range(0, len(flat), count)]  # type: ignore[arg-type]


def _engine_order(i: Inputs) -> dict[str, Tensor | None]:
    """(batch, heads, rows, head_dim) views, under the names of `payload`."""
    return {"q": i.q.transpose(1, 2), "k": i.k.transpose(1, 2), "v": i.v.transpose(1, 2), "bias": i.key_bias}


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink is one more key per head with a learned logit and a value of zero: it only takes weight away."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    keep = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))  # no key and no sink: nothing to keep
    return (out * keep.unsqueeze(-1)).to(out.dtype), total


def _sink_grad(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink's share of each row's weight, (batch, heads, rows), times what that weight takes from the row."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, 0.0))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
