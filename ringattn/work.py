"""The tensors behind a program: what one rank owns, computes, merges and keeps, in each pass.

`payload` says what the four kinds of thing consist of; here that table meets a plan and this rank's tensors. Everything is in
engine order, (batch, heads, rows, head_dim), and sliced by lane (heads) and block (rows). No communication here, and no choice.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ringattn.comm.packing import Spec
from ringattn.engine import Payload
from ringattn.errors import ScheduleError
from ringattn.kernels import Grads, Operands, Options, Rows, get
from ringattn.partial import Partial, accum_dtype, merge_
from ringattn.payload import Field, fields
from ringattn.plan import Block, Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item


class _Pass(ABC):
    """What both passes share: blocks of this rank's tensors, and how things look on the wire."""

    backward: ClassVar[bool]

    def __init__(self, plan: Plan, rank: int, options: Options, **tensors: Tensor | None) -> None:
        self.plan, self.rank, self.options = plan, rank, options
        self.lanes = plan.backward if self.backward else plan.forward
        self.kernel = get(plan.kernel)
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.device, self.dtype = self.tensors["q"].device, self.tensors["q"].dtype
        self.accum = accum_dtype(self.dtype)
        self._specs: dict[Item, Sequence[Spec]] = {}

    def own(self, item: Item) -> Payload:
        return tuple(self._cut(self.tensors[field.name], item) for field in self._fields(item.kind))

    def specs(self, item: Item) -> Sequence[Spec]:
        if item not in self._specs:
            self._specs[item] = [self._spec(field, item) for field in self._fields(item.kind)]
        return self._specs[item]

    def _fields(self, kind: Kind) -> tuple[Field, ...]:
        return fields(kind, backward=self.backward, bias="bias" in self.tensors)

    def _spec(self, field: Field, item: Item) -> Spec:
        like = self._heads(self.tensors[{"q": "q", "kv": "k", "bias": "bias"}[field.heads]], item.lane)
        dims = () if field.dim is None else (self.tensors["q" if field.dim == "qk" else "v"].shape[-1],)
        narrow = not item.kind.moved or self.lanes[item.lane].schedule.straight_home(item.kind)
        dtype = self.dtype if narrow and not field.wide else self.accum
        return Spec((like.shape[0], like.shape[1], self._block(item).rows, *dims), dtype)

    def _block(self, item: Item) -> Block:
        return self.lanes[item.lane].block(item.kind, item.index)

    def _cut(self, tensor: Tensor, item: Item) -> Tensor:
        """Of one of this rank's tensors, the heads and rows that `item` is about."""
        block = self._block(item)
        if block.rank != self.rank:  # `check` proves that this cannot happen, but an unchecked schedule can be run
            raise ScheduleError(f"rank {self.rank} has {item} in hand, which belongs to rank {block.rank}")
        return self._heads(tensor, item.lane)[:, :, block.start : block.stop]

    def _heads(self, tensor: Tensor, lane: int) -> Tensor:
        """This lane's heads of a tensor that has all query heads, all KV heads, or a single shared one."""
        if tensor.shape[1] == 1:
            return tensor
        start, stop = self.lanes[lane].kv_heads
        groups = tensor.shape[1] // self.plan.kv_heads
        return tensor[:, start * groups : stop * groups]

    def _collect(self, gathered: Mapping[Item, Sequence[Tensor]], into: Mapping[str, Tensor]) -> None:
        """Write the accumulators that ended here into whole tensors."""
        for item, payload in gathered.items():
            for field, share in zip(self._fields(item.kind), payload, strict=True):
                target = self._cut(into[field.name], item)
                # Lanes may share one bias; everything else belongs to one lane.
                target.add_(share) if field.heads == "bias" else target.copy_(share)


class Forward(_Pass):
    """out and lse of this rank's queries. Tensors: q, k, v and perhaps bias."""

    backward = False

    def compute(self, lane: int, i: int, j: int, q: Payload, kv: Payload) -> dict[Item, Partial]:
        pieces = self.lanes[lane].pieces[i, j]
        return {Item(lane, Kind.Q_ACC, i): self.kernel.forward(_operands(q[0], kv), pieces, self.options)}

    def merge(self, total: Partial, share: Partial) -> Partial:
        total = Partial(total.out.to(self.accum), total.lse)
        merge_(total, share)
        return total

    def unship(self, item: Item, payload: Payload) -> Partial:
        return Partial(*payload)

    def result(self, gathered: dict[Item, Partial]) -> Partial:
        """All rows and heads of this rank: out in the dtype of q and in (batch, rows, heads, head_dim) memory order, lse."""
        batch, heads, rows, _ = self.tensors["q"].shape
        out = self.tensors["q"].new_zeros(batch, rows, heads, self.tensors["v"].shape[-1]).transpose(1, 2)
        lse = torch.full((batch, heads, rows), -torch.inf, dtype=self.accum, device=self.device)
        self._collect(gathered, {"out": out, "lse": lse})
        return Partial(out, lse)


class Backward(_Pass):
    """Gradients of this rank's q, k, v and bias. Tensors: as in forward, and dout, lse, delta of its rows."""

    backward = True

    def __init__(self, plan: Plan, rank: int, options: Options, *, lse: Tensor, **tensors: Tensor | None) -> None:
        # A row that saw no key has no gradient: with lse = +inf each of its probabilities is exp(-inf) = 0.
        super().__init__(plan, rank, options, lse=lse.masked_fill(lse == -torch.inf, torch.inf), **tensors)

    def compute(self, lane: int, i: int, j: int, q: Payload, kv: Payload) -> dict[Item, Payload]:
        query, dout, lse, delta = q
        pieces = self.lanes[lane].pieces[i, j]
        dq, *of_keys = self.kernel.backward(_operands(query, kv), Rows(dout, lse, delta), pieces, self.options)
        return {
            Item(lane, Kind.Q_ACC, i): (dq,),
            Item(lane, Kind.KV_ACC, j): tuple(grad for grad in of_keys if grad is not None),
        }

    def merge(self, total: Payload, share: Payload) -> Payload:
        return tuple(t.to(self.accum).add_(s) for t, s in zip(total, share, strict=True))

    def unship(self, item: Item, payload: Payload) -> Payload:
        return payload

    def result(self, gathered: dict[Item, Payload]) -> Grads:
        """dq, dk, dv in the dtype and memory order of the inputs; dbias in the accumulation dtype."""
        grads = {f"d{name}": torch.zeros_like(self.tensors[name]) for name in ("q", "k", "v", "bias") if name in self.tensors}
        self._collect(gathered, grads)
        return Grads(grads["dq"], grads["dk"], grads["dv"], grads.get("dbias"))


def _operands(query: Tensor, kv: Payload) -> Operands:
    return Operands(query, kv[0], kv[1], kv[2] if len(kv) > 2 else None)
