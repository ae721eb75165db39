"""What the four kinds of thing are made of, in each pass: the only place that knows both the plan and the tensors.

            Q                        KV              Q_ACC            KV_ACC
forward     q                        k, v (, bias)   out, lse         -
backward    q, dout, lse, delta      k, v (, bias)   dq               dk, dv (, dbias)

Sums are kept in fp32 (fp64 for fp64). On the wire an accumulator that goes straight home travels in the dtype of q, rounded once, which
the kernel's own output already was; one that gathers on its way stays in the accumulation dtype, because rounding it at every
hop would let the error grow with the number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ringattn.comm.packing import Spec
from ringattn.engine import Payload
from ringattn.errors import ScheduleError
from ringattn.kernels import Grads, Kernel, Options, get
from ringattn.partial import Partial, accum_dtype, merge_
from ringattn.plan import Block, Lane, Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item


class _Pass(ABC):
    """One rank's tensors in engine order: (batch, heads, rows, head_dim), sliced by lane and block."""

    def __init__(self, plan: Plan, rank: int, options: Options, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        self.plan, self.lanes, self.rank, self.options = plan, self._lanes(plan), rank, options
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.device = q.device
        self.kernel: Kernel = get(plan.kernel)
        self.accum = accum_dtype(q.dtype)

    @staticmethod
    @abstractmethod
    def _lanes(plan: Plan) -> tuple[Lane, ...]:
        """The lanes of this pass."""

    @abstractmethod
    def _result_specs(self, item: Item) -> Sequence[Spec]:
        """An accumulator on the wire."""

    def _heads(self, tensor: Tensor, lane: int) -> Tensor:
        """This lane's heads of a tensor that has all query heads, all KV heads, or a single shared one."""
        if tensor.shape[1] == 1:
            return tensor
        start, stop = self.lanes[lane].kv_heads
        groups = tensor.shape[1] // self.plan.kv_heads
        return tensor[:, start * groups : stop * groups]

    def _block(self, item: Item) -> Block:
        return self.lanes[item.lane].block(item.kind, item.index)

    def _cut(self, tensor: Tensor, item: Item) -> Tensor:
        """Of one of this rank's tensors, the heads and rows that `item` is about."""
        block = self._block(item)
        if block.rank != self.rank:  # `check` proves that this cannot happen, but an unchecked schedule can be run
            raise ScheduleError(f"rank {self.rank} has {item} in hand, which belongs to rank {block.rank}")
        return self._heads(tensor, item.lane)[:, :, block.start : block.stop]

    def _spec(self, tensor: Tensor, item: Item, dtype: torch.dtype | None = None) -> Spec:
        """Like `_cut` of `tensor`, but with as many rows as the block has at its own rank."""
        batch, heads, _, *rest = self._heads(tensor, item.lane).shape
        return Spec((batch, heads, self._block(item).rows, *rest), dtype or tensor.dtype)

    def _wire(self, item: Item) -> torch.dtype:
        straight = self.lanes[item.lane].schedule.straight_home(item.kind)
        return self.q.dtype if straight else self.accum

    @cached_property
    def _inputs(self) -> dict[Kind, list[Tensor]]:
        return {Kind.Q: self._query_inputs(), Kind.KV: [self.k, self.v] + ([self.bias] if self.bias is not None else [])}

    def _query_inputs(self) -> list[Tensor]:
        return [self.q]

    def own(self, item: Item) -> Payload:
        return tuple(self._cut(tensor, item) for tensor in self._inputs[item.kind])

    def specs(self, item: Item) -> Sequence[Spec]:
        if item.kind.moved:
            return self._result_specs(item)
        return [self._spec(tensor, item) for tensor in self._inputs[item.kind]]


class Forward(_Pass):
    """out and lse of this rank's queries."""

    @staticmethod
    def _lanes(plan: Plan) -> tuple[Lane, ...]:
        return plan.forward

    def compute(self, lane: int, i: int, j: int, q: Payload, kv: Payload) -> dict[Item, Partial]:
        pieces = self.lanes[lane].pieces[i, j]
        return {Item(lane, Kind.Q_ACC, i): self.kernel.forward(*q, *_with_bias(kv), pieces, self.options)}

    def merge(self, total: Partial, share: Partial) -> Partial:
        if total.out.dtype != self.accum:
            total = Partial(total.out.to(self.accum), total.lse)
        merge_(total, share)
        return total

    def _result_specs(self, item: Item) -> Sequence[Spec]:
        out = self._spec(self.q, item, self._wire(item))
        return [out._replace(shape=(*out.shape[:-1], self.v.shape[-1])), Spec(out.shape[:-1], self.accum)]

    def ship(self, item: Item, total: Partial) -> Payload:
        return total

    def unship(self, item: Item, payload: Payload) -> Partial:
        return Partial(*payload)

    def result(self, gathered: dict[Item, Partial]) -> Partial:
        """All rows and heads of this rank: out in the dtype of q and in (batch, rows, heads, head_dim) memory order, lse."""
        batch, heads, rows, _ = self.q.shape
        out = self.q.new_zeros(batch, rows, heads, self.v.shape[-1]).transpose(1, 2)
        lse = torch.full((batch, heads, rows), -torch.inf, dtype=self.accum, device=self.device)
        for item, part in gathered.items():
            self._cut(out, item).copy_(part.out)
            self._cut(lse, item).copy_(part.lse)
        return Partial(out, lse)


class Backward(_Pass):
    """Gradients of this rank's q, k, v and bias, from dout and the row statistics lse and delta."""

    @staticmethod
    def _lanes(plan: Plan) -> tuple[Lane, ...]:
        return plan.backward

    def __init__(self, *args: Any, dout: Tensor, lse: Tensor, delta: Tensor) -> None:
        super().__init__(*args)
        # A row that saw no key has no gradient: with lse = +inf each of its probabilities is exp(-inf) = 0.
        self.dout, self.delta, self.lse = dout, delta, lse.masked_fill(lse == -torch.inf, torch.inf)

    def _query_inputs(self) -> list[Tensor]:
        return [self.q, self.dout, self.lse, self.delta]

    def compute(self, lane: int, i: int, j: int, q: Payload, kv: Payload) -> dict[Item, Payload]:
        query, dout, lse, delta = q
        key, value, bias = _with_bias(kv)
        pieces = self.lanes[lane].pieces[i, j]
        grads: Grads = self.kernel.backward(query, key, value, bias, dout, lse, delta, pieces, self.options)
        of_keys = (grads.dk, grads.dv) if grads.dbias is None else (grads.dk, grads.dv, grads.dbias)
        return {Item(lane, Kind.Q_ACC, i): (grads.dq,), Item(lane, Kind.KV_ACC, j): of_keys}

    def merge(self, total: Payload, share: Payload) -> Payload:
        return tuple(
            t.add_(s) if t.dtype == self.accum else t.to(self.accum).add_(s) for t, s in zip(total, share, strict=True)
        )

    def _result_specs(self, item: Item) -> Sequence[Spec]:
        like = [self.q] if item.kind is Kind.Q_ACC else self._inputs[Kind.KV]
        # A bias is kept in the accumulation dtype, and its gradient travels so.
        return [self._spec(tensor, item, None if tensor is self.bias else self._wire(item)) for tensor in like]

    def ship(self, item: Item, total: Payload) -> Payload:
        return total

    def unship(self, item: Item, payload: Payload) -> Payload:
        return payload

    def result(self, gathered: dict[Item, Payload]) -> Grads:
        """dq, dk, dv in the dtype and memory order of the inputs; dbias in the accumulation dtype."""
        dq, dk, dv = (torch.zeros_like(t) for t in (self.q, self.k, self.v))
        dbias = None if self.bias is None else torch.zeros_like(self.bias)
        for item, payload in gathered.items():
            for grad, share in zip([dq] if item.kind is Kind.Q_ACC else [dk, dv, dbias], payload, strict=False):
                # Lanes share a bias that is the same for all heads; everything else is written by one lane only.
                self._cut(grad, item).add_(share) if grad is dbias else self._cut(grad, item).copy_(share)
        return Grads(dq, dk, dv, dbias)


def _with_bias(kv: Payload) -> tuple[Tensor, Tensor, Tensor | None]:
    return (*kv, None) if len(kv) == 2 else kv  # type: ignore[return-value]
