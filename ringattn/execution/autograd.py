"""Attention over all shards as one differentiable function.

Forward runs the plan's forward program and saves only this rank's q, k, v, out and lse; backward runs the plan's backward
program, which may be another schedule. Where inputs rest away from home (Ulysses), what rests on this rank is saved instead of
its q, k and v: as many bytes, and they need not travel again. Sinks need no schedule at all: they join at the owner, after all
partials have been merged.

`attend` is told which ranks it hosts by its transport: one, as a member of a process group, or all of them when simulated. It
is for eager mode; `op` wraps the same two functions, `run_forward` and `run_backward`, for torch.compile.
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
from ringattn.execution.first_order import only_once, unsupported_gradient, unsupported_transform
from ringattn.kernels import Options
from ringattn.kernels.fused import row_statistics
from ringattn.kernels.lse import accum_dtype
from ringattn.plan.plan import Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item

Resident: TypeAlias = dict[Item, Payload]


class Inputs(NamedTuple):
    """One rank's tensors as the public interface has them."""

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
    """What a kernel is told beside its operands; the scale is 1 / sqrt(head_dim) where none is given."""
    return Options(1 / sqrt(plan.head_dim) if scale is None else float(scale), softcap)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off, if it is on: switching costs more than a small kernel."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, options: Options, transport: Transport, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _by_rank(flat)
        keep = plan.reuse_inputs and any(ctx.needs_input_grad)
        results, kept = run_forward(inputs, plan, options, transport, keep=keep)
        ctx.plan, ctx.options, ctx.transport = plan, options, transport
        ctx.mark_non_differentiable(*results[1::2])
        ctx.kept = [{item: len(payload) for item, payload in blocks.items()} for blocks in kept]
        ctx.ghosts = [{name: _ghost(getattr(i, name)) for name in "qkv"} for i in inputs] if keep else None
        own = [tensor for i in inputs for tensor in (None, None, None, i.key_bias, i.sinks)] if keep else flat
        ctx.save_for_backward(*own, *results, *(tensor for blocks in kept for part in blocks.values() for tensor in part))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if problem := unsupported_gradient(*grads):
            raise InputError(problem)
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
        count = len(Inputs._fields) * len(ctx.transport.ranks)
        inputs, results, kept = _by_rank(saved[:count]), saved[count : count + len(grads)], iter(saved[count + len(grads) :])
        if ctx.ghosts is not None:
            inputs = [i._replace(**ghosts) for i, ghosts in zip(inputs, ctx.ghosts, strict=True)]
        # Backward may be called inside of `torch.autocast`, which would round what is summed in fp32.
        with torch.no_grad(), without_autocast(results[0].device.type):
            found = run_backward(inputs, results, grads[::2], ctx.kept, kept, ctx.plan, ctx.options, ctx.transport)
        # Every out depends on all inputs, also on those that were not saved.
        flat = only_once([grad for of_rank in found for grad in of_rank], *results[::2], *grads[::2])
        return (None, None, None, *flat)


def run_forward(
    inputs: Sequence[Inputs], plan: Plan, options: Options, transport: Transport, *, keep: bool
) -> tuple[list[Tensor], list[Resident]]:
    """out and lse of each rank that `transport` hosts, one after another; and, with `keep`, what rests there for backward."""
    works = [Forward(plan, rank, options, **engine_order(i)) for rank, i in zip(transport.ranks, inputs, strict=True)]
    resident: list[Resident] = [{} for _ in works]
    made = _carried_out(plan, works, resident, transport, backward=False)
    results: list[Tensor] = []
    for i, work, gathered in zip(inputs, works, made, strict=True):
        out, lse = work.result(gathered)
        if i.sinks is not None:
            out, lse = _with_sinks(out, lse, i.sinks)
        results += [out.transpose(1, 2), lse]
    return results, [resting(work, blocks) if keep else {} for work, blocks in zip(works, resident, strict=True)]


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
    """Gradients of each rank's `inputs`. `sizes`: how many tensors of `kept` belong to each block that has stayed on it."""
    works, deltas = [], []
    for rank, i, dout, out, lse in zip(transport.ranks, inputs, douts, results[::2], results[1::2], strict=True):
        dout, out = dout.transpose(1, 2), out.transpose(1, 2)
        delta, safe_lse = row_statistics(dout, out, lse)
        deltas.append(delta)
        works.append(Backward(plan, rank, options, **engine_order(i), dout=dout, lse=safe_lse, delta=delta, out=out))
    resident = [back(work, counts, kept) for work, counts in zip(works, sizes, strict=True)]
    made = _carried_out(plan, works, resident, transport, backward=True)
    found: list[tuple[Tensor | None, ...]] = []
    for i, work, gathered, delta, lse in zip(inputs, works, made, deltas, results[1::2], strict=True):
        dq, dk, dv, dbias = work.result(gathered)
        if dbias is not None and i.key_bias is not None:
            dbias = dbias.to(i.key_bias.dtype).reshape(i.key_bias.shape)
        dsinks = None if i.sinks is None else _sink_grad(i.sinks, lse, delta)
        found.append((dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias, dsinks))
    return found


def _carried_out(
    plan: Plan, works: Sequence[Forward | Backward], resident: Sequence[Resident], transport: Transport, *, backward: bool
) -> list[dict[Item, Any]]:
    """What each hosted rank has at the end of one pass; under the pass's name in profiles, errors and journals."""
    name = plan.pass_name(backward=backward)
    runs = [
        run(plan.program(work.rank, backward=backward), work, port, blocks)
        for work, port, blocks in zip(works, transport.ports(name), resident, strict=True)
    ]
    with span(name) if profiling() else nullcontext():
        return transport.drive(runs)


def residents(plan: Plan, rank: int) -> list[Item]:
    """The inputs that `resting` finds on `rank`, told from its program alone: those it takes in, sends on or computes with."""
    found: set[Item] = set()
    for step in plan.program(rank, backward=False):
        for message in (*(m for m in step.arrival if m.dst == rank), *(m for m in step.post if m.src == rank)):
            found.update(message.items)
        for tiles in step.tiles:
            found.update(Item(tiles.head_group, Kind.Q, i) for i in tiles.i)
            found.update(Item(tiles.head_group, Kind.KV, j) for j in tiles.j)
    inputs = [item for item in found if not item.kind.moved]
    stay = [item for item in inputs if plan.forward[item.head_group].schedule.resident_rank(item.kind, item.index) == rank]
    return sorted(stay, key=lambda item: (item.head_group, item.kind.value, item.index))


def resting(work: Forward, resident: Resident) -> Resident:
    """What stays on this rank until backward. Own rows are copied, or all heads of them would stay."""
    stays = {item: payload for item, payload in resident.items() if work.rests_here(item)}
    return {i: tuple(t.clone() for t in payload) if work.owns(i) else payload for i, payload in stays.items()}


def back(work: Backward, sizes: Mapping[Item, int], kept: Iterator[Tensor]) -> Resident:
    """What has stayed, as backward has it: to own queries comes at once what those of others will be sent."""
    resident = {item: tuple(next(kept) for _ in range(size)) for item, size in sizes.items()}
    return {i: (*payload, *work.own(i._replace(new=True))) if work.owns(i) else payload for i, payload in resident.items()}


def _ghost(tensor: Tensor) -> Tensor:
    """Shape, dtype and device of `tensor` without its memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _by_rank(flat: Sequence[Tensor | None]) -> list[Inputs]:
    count = len(Inputs._fields)
    return [Inputs(*flat[n : n + count]) for n in range(0, len(flat), count)]  # type: ignore[arg-type]


def engine_order(i: Inputs) -> dict[str, Tensor | None]:
    """(batch, heads, rows, head_dim) views, under the names of `payload`."""
    bias = i.key_bias
    if bias is not None:
        bias = (bias.unsqueeze(1) if bias.ndim == 2 else bias).to(accum_dtype(i.q.dtype))
    return {"q": i.q.transpose(1, 2), "k": i.k.transpose(1, 2), "v": i.v.transpose(1, 2), "bias": bias}


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink is one more key per head with a learned logit and a value of zero: it only takes weight away."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    keep = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))  # no key and no sink: nothing to keep
    return (out * keep.unsqueeze(-1)).to(out.dtype), total


def _sink_grad(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink's share of each row's weight, (batch, heads, rows), times what that weight takes from the row."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, 0.0))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
