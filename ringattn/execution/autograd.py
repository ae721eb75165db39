"""Makes attention over all shards one differentiable function.

Forward runs the plan's forward program and saves only this rank's q, k, v, out and lse; backward runs the plan's backward
program, which may be another schedule. Where inputs are resident on another rank than their owner (Ulysses), the resident
inputs are saved instead of this rank's q, k and v: as many bytes, and they need not travel again. Sinks need no schedule: the
owner adds them after all partials have been merged.

The transport says which ranks `attend` hosts: one, as a member of a process group, or all of them when simulated. It is for
eager mode; `custom_op` wraps the same two functions, `run_forward` and `run_backward`, for torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.blocks import Backward, Forward
from ringattn.execution.engine import Payload, profiling, run, span
from ringattn.execution.first_order import differentiable_once, unsupported_gradient, unsupported_transform
from ringattn.kernels import Options
from ringattn.kernels.fused import row_statistics
from ringattn.kernels.lse import accum_dtype
from ringattn.plan.plan import Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item

Resident: TypeAlias = dict[Item, Payload]


class Inputs(NamedTuple):
    """One rank's tensors, shaped as in the public interface."""

    q: Tensor  # (batch, rows, heads, head_dim)
    k: Tensor  # (batch, rows, kv_heads, head_dim)
    v: Tensor  # (batch, rows, kv_heads, head_dim)
    key_bias: Tensor | None = None  # (batch, rows), or (batch, 1 or kv_heads, rows)
    sinks: Tensor | None = None  # (heads,)


def attend(inputs: Sequence[Inputs], plan: Plan, options: Options, transport: Transport) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) for each rank that `transport` hosts, in order; see `attention` for shapes."""
    flat = [tensor for rank_inputs in inputs for tensor in rank_inputs]
    if problem := unsupported_transform(*flat):
        raise InputError(problem)
    with without_autocast(inputs[0].q.device.type):
        results = _Attend.apply(plan, options, transport, *flat)
    return list(zip(results[::2], results[1::2], strict=True))


def options_for(plan: Plan, scale: float | None, softcap: float | None) -> Options:
    """The kernel's options; the scale defaults to 1 / sqrt(head_dim)."""
    return Options(1 / sqrt(plan.head_dim) if scale is None else float(scale), softcap)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off if it is on; the check saves a switch that costs more than a small kernel."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, options: Options, transport: Transport, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _by_rank(flat)
        keep_inputs = plan.reuse_inputs and any(ctx.needs_input_grad)
        results, kept = run_forward(inputs, plan, options, transport, keep_inputs=keep_inputs)
        ctx.plan, ctx.options, ctx.transport = plan, options, transport
        ctx.mark_non_differentiable(*results[1::2])
        ctx.kept = [{item: len(payload) for item, payload in blocks.items()} for blocks in kept]
        ctx.shapes = [{name: _shape_only(getattr(i, name)) for name in "qkv"} for i in inputs] if keep_inputs else None
        own = [tensor for i in inputs for tensor in (None, None, None, i.key_bias, i.sinks)] if keep_inputs else flat
        ctx.save_for_backward(*own, *results, *(tensor for blocks in kept for part in blocks.values() for tensor in part))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if problem := unsupported_gradient(*grads):
            raise InputError(problem)
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes at the first read and raises at a second
        count = len(Inputs._fields) * len(ctx.transport.ranks)
        inputs, results, kept = _by_rank(saved[:count]), saved[count : count + len(grads)], iter(saved[count + len(grads) :])
        if ctx.shapes is not None:
            inputs = [i._replace(**shapes) for i, shapes in zip(inputs, ctx.shapes, strict=True)]
        # Backward may be called inside of `torch.autocast`, which would round fp32 sums.
        with torch.no_grad(), without_autocast(results[0].device.type):
            grads_by_rank = run_backward(inputs, results, grads[::2], ctx.kept, kept, ctx.plan, ctx.options, ctx.transport)
        # Every out depends on all inputs, including those that were not saved.
        flat = differentiable_once([grad for rank_grads in grads_by_rank for grad in rank_grads], *results[::2], *grads[::2])
        return (None, None, None, *flat)


def run_forward(
    inputs: Sequence[Inputs], plan: Plan, options: Options, transport: Transport, *, keep_inputs: bool
) -> tuple[list[Tensor], list[Resident]]:
    """Run forward: out and lse of each hosted rank, in order; with `keep_inputs`, the resident inputs for backward."""
    ops_by_rank = [Forward(plan, rank, options, **engine_order(i)) for rank, i in zip(transport.ranks, inputs, strict=True)]
    resident: list[Resident] = [{} for _ in ops_by_rank]
    gathered_by_rank = _run_pass(plan, ops_by_rank, resident, transport, backward=False)
    results: list[Tensor] = []
    for i, ops, gathered in zip(inputs, ops_by_rank, gathered_by_rank, strict=True):
        out, lse = ops.result(gathered)
        if i.sinks is not None:
            out, lse = _with_sinks(out, lse, i.sinks)
        results += [out.transpose(1, 2), lse]
    return results, [kept_inputs(ops, blocks) if keep_inputs else {} for ops, blocks in zip(ops_by_rank, resident, strict=True)]


def run_backward(
    inputs: Sequence[Inputs],
    results: Sequence[Tensor],
    douts: Sequence[Tensor],
    sizes: Sequence[Mapping[Item, int]],
    kept: Iterator[Tensor],
    plan: Plan,
    options: Options,
    transport: Transport,
) -> list[tuple[Tensor | None, ...]]:
    """Run backward: gradients of each rank's `inputs`. `sizes`: number of tensors in `kept` for each block kept on the rank."""
    ops_by_rank, deltas = [], []
    for rank, i, dout, out, lse in zip(transport.ranks, inputs, douts, results[::2], results[1::2], strict=True):
        dout, out = dout.transpose(1, 2), out.transpose(1, 2)
        delta, safe_lse = row_statistics(dout, out, lse)
        deltas.append(delta)
        ops_by_rank.append(Backward(plan, rank, options, **engine_order(i), dout=dout, lse=safe_lse, delta=delta, out=out))
    resident = [restored_inputs(ops, counts, kept) for ops, counts in zip(ops_by_rank, sizes, strict=True)]
    gathered_by_rank = _run_pass(plan, ops_by_rank, resident, transport, backward=True)
    grads: list[tuple[Tensor | None, ...]] = []
    for i, ops, gathered, delta, lse in zip(inputs, ops_by_rank, gathered_by_rank, deltas, results[1::2], strict=True):
        dq, dk, dv, dbias = ops.result(gathered)
        if dbias is not None and i.key_bias is not None:
            dbias = dbias.to(i.key_bias.dtype).reshape(i.key_bias.shape)
        dsinks = None if i.sinks is None else _sink_grad(i.sinks, lse, delta)
        grads.append((dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias, dsinks))
    return grads


def _run_pass(
    plan: Plan, ops_by_rank: Sequence[Forward | Backward], resident: Sequence[Resident], transport: Transport, *, backward: bool
) -> list[dict[Item, Any]]:
    """Run one pass on all hosted ranks, under its name in profiles, errors and event logs; returns their accumulators."""
    name = plan.pass_name(backward=backward)
    runs = [
        run(plan.program(ops.rank, backward=backward), ops, port, blocks)
        for ops, port, blocks in zip(ops_by_rank, transport.ports(name), resident, strict=True)
    ]
    with span(name) if profiling() else nullcontext():
        return transport.drive(runs)


def resident_items(plan: Plan, rank: int) -> list[Item]:
    """The inputs that `kept_inputs` returns on `rank`, from its program: those it receives, sends or computes with."""
    items: set[Item] = set()
    for step in plan.program(rank, backward=False):
        for message in (*(m for m in step.arrival if m.dst == rank), *(m for m in step.post if m.src == rank)):
            items.update(message.items)
        for tiles in step.tiles:
            items.update(Item(tiles.head_group, Kind.Q, i) for i in tiles.i)
            items.update(Item(tiles.head_group, Kind.KV, j) for j in tiles.j)
    inputs = [item for item in items if not item.kind.moved]
    stay = [item for item in inputs if plan.forward[item.head_group].schedule.resident_rank(item.kind, item.index) == rank]
    return sorted(stay, key=lambda item: (item.head_group, item.kind.value, item.index))


def kept_inputs(ops: Forward, resident: Resident) -> Resident:
    """The inputs that stay on this rank until backward. Own rows are copied, else all of their heads would stay in memory."""
    stays = {item: payload for item, payload in resident.items() if ops.is_resident(item)}
    return {i: tuple(t.clone() for t in payload) if ops.owns(i) else payload for i, payload in stays.items()}


def restored_inputs(ops: Backward, sizes: Mapping[Item, int], kept: Iterator[Tensor]) -> Resident:
    """The kept inputs as backward needs them: own queries get their backward fields at once, other queries receive them."""
    resident = {item: tuple(next(kept) for _ in range(size)) for item, size in sizes.items()}
    return {i: (*payload, *ops.own(i._replace(new=True))) if ops.owns(i) else payload for i, payload in resident.items()}


def _shape_only(tensor: Tensor) -> Tensor:
    """Shape, dtype and device of `tensor` without its memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _by_rank(flat: Sequence[Tensor | None]) -> list[Inputs]:
    count = len(Inputs._fields)
    return [Inputs(*flat[n : n + count]) for n in range(0, len(flat), count)]  # type: ignore[arg-type]


def engine_order(i: Inputs) -> dict[str, Tensor | None]:
    """(batch, heads, rows, head_dim) views, by the names that `wire_fields` uses."""
    bias = i.key_bias
    if bias is not None:
        bias = (bias.unsqueeze(1) if bias.ndim == 2 else bias).to(accum_dtype(i.q.dtype))
    return {"q": i.q.transpose(1, 2), "k": i.k.transpose(1, 2), "v": i.v.transpose(1, 2), "bias": bias}


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add sinks: one more key per head with a learned logit and a value of zero, which only takes weight."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    kept_weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))  # no key and no sink: weight 0
    return (out * kept_weight.unsqueeze(-1)).to(out.dtype), total


def _sink_grad(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of sinks: the weight of the sink in each row, (batch, heads, rows), times -delta, summed."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, 0.0))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
