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
from ringattn.lanes import Block
from ringattn.partial import Partial, accum_dtype, merge_
from ringattn.payload import Field, fields
from ringattn.plan import Plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Work


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
        return tuple(self._cut(field, item) for field in self._fields(item.kind, new=item.new))

    def specs(self, item: Item) -> Sequence[Spec]:
        if item not in self._specs:
            self._specs[item] = [self._spec(field, item) for field in self._fields(item.kind, new=item.new)]
        return self._specs[item]

    def rests_here(self, item: Item) -> bool:
        """Whether input `item` stays on this rank from forward to backward."""
        return self.lanes[item.lane].schedule.rest(item.kind, item.index) == self.rank

    def owns(self, item: Item) -> bool:
        """Whether the rows of `item` are this rank's."""
        return self._block(item).rank == self.rank

    def _fields(self, kind: Kind, *, new: bool = False) -> tuple[Field, ...]:
        return fields(kind, backward=self.backward, bias="bias" in self.tensors, new=new)

    def _spec(self, field: Field, item: Item) -> Spec:
        like = self._heads(self.tensors[{"q": "q", "kv": "k", "bias": "bias"}[field.heads]], field, item.lane)
        dims = () if field.dim is None else (self.tensors["q" if field.dim == "qk" else "v"].shape[-1],)
        narrow = not item.kind.moved or self.plan.rounds(self.lanes[item.lane], item.kind)
        dtype = self.dtype if narrow and not field.wide else self.accum
        return Spec((like.shape[0], like.shape[1], self._block(item).rows, *dims), dtype)

    def _block(self, item: Item) -> Block:
        return self.lanes[item.lane].block(item.kind, item.index)

    def _cut(self, field: Field, item: Item, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Of one of this rank's tensors, the heads and rows that `item` is about."""
        block = self._block(item)
        if block.rank != self.rank:  # `check` proves that this cannot happen, but an unchecked schedule can be run
            raise ScheduleError(f"rank {self.rank} has {item} in hand, which belongs to rank {block.rank}")
        tensor = (self.tensors if tensors is None else tensors)[field.name]
        return self._heads(tensor, field, item.lane)[:, :, block.start : block.stop]

    def _heads(self, tensor: Tensor, field: Field, lane: int) -> Tensor:
        """This lane's heads of a tensor that has all query heads, all KV heads, or a single bias for all."""
        heads = self.lanes[lane].heads
        if field.heads == "q":
            return tensor[:, heads.q_start : heads.q_stop]
        return tensor if field.heads == "bias" and tensor.shape[1] == 1 else tensor[:, heads.kv_start : heads.kv_stop]

    def _parts(self, tiles: Work, kind: Kind) -> list[tuple[Item, slice]]:
        """The blocks of `tiles`, each with its place when they are put one behind another."""
        found, start = [], 0
        for index in tiles.i if kind.of_queries else tiles.j:
            item = Item(tiles.lane, kind, index)
            stop = start + self._block(item).rows
            found.append((item, slice(start, stop)))
            start = stop
        return found

    def _collect(self, gathered: Mapping[Item, Sequence[Tensor]], into: Mapping[str, Tensor]) -> None:
        """Add the accumulators that ended here into whole tensors; lanes may share a KV head, or one bias."""
        for item, payload in gathered.items():
            for field, share in zip(self._fields(item.kind), payload, strict=True):
                target = self._cut(field, item, into)
                target.copy_(share) if field.heads == "q" or not self._shared else target.add_(share)

    @property
    def _shared(self) -> bool:
        """Whether several lanes have gradients for the same KV heads."""
        several = sum(lane.heads.of_keys for lane in self.lanes) > self.plan.kv_heads
        return several or self.tensors.get("bias", self.tensors["k"]).shape[1] == 1


def _joined(payloads: Sequence[Payload]) -> Payload:
    """The rows of several blocks, one behind another."""
    return payloads[0] if len(payloads) == 1 else tuple(torch.cat(parts, dim=2) for parts in zip(*payloads, strict=True))


class Forward(_Pass):
    """out and lse of this rank's queries. Tensors: q, k, v and perhaps bias."""

    backward = False

    def compute(self, tiles: Work, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Partial]:
        pieces = self.lanes[tiles.lane].pieces(tiles)
        out, lse = self.kernel.forward(_operands(_joined(q)[0], _joined(kv)), pieces, self.options)
        return {item: Partial(out[:, :, rows], lse[:, :, rows]) for item, rows in self._parts(tiles, Kind.Q_ACC)}

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

    def compute(self, tiles: Work, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Payload]:
        query, dout, lse, delta = _joined(q)
        pieces = self.lanes[tiles.lane].pieces(tiles)
        grads = self.kernel.backward(_operands(query, _joined(kv)), Rows(dout, lse, delta), pieces, self.options)
        of_keys = [grad for grad in grads[1:] if grad is not None]
        shares: dict[Item, Payload] = {item: (grads.dq[:, :, rows],) for item, rows in self._parts(tiles, Kind.Q_ACC)}
        for item, rows in self._parts(tiles, Kind.KV_ACC):
            shares[item] = tuple(grad[:, :, rows] for grad in of_keys)
        return shares

    def merge(self, total: Payload, share: Payload) -> Payload:
        return tuple(t.to(self.accum).add_(s) for t, s in zip(total, share, strict=True))

    def unship(self, item: Item, payload: Payload) -> Payload:
        return payload

    def result(self, gathered: dict[Item, Payload]) -> Grads:
        """dq, dk, dv in the dtype and memory order of the inputs; dbias in the accumulation dtype."""
        names = [name for name in ("q", "k", "v", "bias") if name in self.tensors]
        dtypes = {name: self.accum if self._shared and name in "kv" else self.tensors[name].dtype for name in names}
        grads = {f"d{name}": torch.zeros_like(self.tensors[name], dtype=dtypes[name]) for name in names}
        self._collect(gathered, grads)
        dq, dk, dv = (grads[f"d{name}"].to(self.dtype) for name in "qkv")
        return Grads(dq, dk, dv, grads.get("dbias"))


def _operands(query: Tensor, kv: Payload) -> Operands:
    return Operands(query, kv[0], kv[1], kv[2] if len(kv) > 2 else None)
