"""Holds the tensors of one rank during a pass: blocks it owns, tiles it computes, partial results it merges.

`wire_fields` defines the tensors of the four kinds of block and `shapes` their sizes; this module applies both to the rank's
tensors. Everything is in engine order, (batch, heads, rows, head_dim), and sliced by head group (heads) and block (rows). There
is no communication and no planning here.

A share, the part of an accumulator that some tiles contribute, is a list of rows of its block: `PartialRows` (out, lse) in
forward, and in backward a tuple of `SumRows`, one for each gradient. A kernel computes, and a merge reads, only rows that a
tile touches.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ringattn.errors import ScheduleError
from ringattn.execution.engine import Payload
from ringattn.execution.shapes import InputSizes, Span, Touched, shapes_of
from ringattn.kernels import Grads, Operands, Options, Rows, get
from ringattn.kernels.fused import PartialRows, SumRows, add, merge, surrogate_out
from ringattn.kernels.lse import Partial
from ringattn.plan.plan import Plan
from ringattn.plan.wire_fields import Field, fields
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item
from ringattn.schedule.program import TileBatch as TileBatch

Sums = tuple[SumRows, ...]

_DOUT = fields(Kind.Q, backward=True, bias=False)[1]  # out is sliced as dout is


class _Pass(ABC):
    """The common part of both passes: blocks of this rank's tensors, and their layout on the wire."""

    backward: ClassVar[bool]

    def __init__(self, plan: Plan, rank: int, options: Options, **tensors: Tensor | None) -> None:
        self.plan, self.rank, self.options = plan, rank, options
        self.head_groups = plan.backward if self.backward else plan.forward
        self.kernel = get(plan.kernel)
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        q, v, bias = self.tensors["q"], self.tensors["v"], self.tensors.get("bias")
        self.device, self.dtype = q.device, q.dtype
        inputs = InputSizes(q.shape[0], v.shape[-1], q.dtype, 0 if bias is None else bias.shape[1])
        self.shapes = shapes_of(plan, inputs, backward=self.backward)
        self.accum = self.shapes.accum
        self.wire = self.shapes.wire

    def own(self, item: Item) -> Payload:
        return tuple(self._cut(field, item, self.tensors[field.name]) for field in self.shapes.fields(item.kind, new=item.new))

    def operand(self, item: Item, payload: Payload) -> Payload:
        return payload

    def is_resident(self, item: Item) -> bool:
        """Whether input `item` stays on this rank from forward to backward."""
        return self.head_groups[item.head_group].schedule.resident_rank(item.kind, item.index) == self.rank

    def owns(self, item: Item) -> bool:
        """Whether the rows of `item` are this rank's."""
        return self.shapes.block(item).rank == self.rank

    def _cut(self, field: Field, item: Item, tensor: Tensor) -> Tensor:
        """Slice the heads and rows of `item` from one of this rank's tensors."""
        block = self.shapes.block(item)
        if block.rank != self.rank:  # `check` proves that this cannot happen, but an unchecked schedule can be run
            raise ScheduleError(f"rank {self.rank} uses {item}, which belongs to rank {block.rank}")
        first, count = self.shapes.heads(field, item.head_group)
        if count != tensor.shape[1]:
            tensor = tensor.narrow(1, first, count)
        return tensor if block.rows == tensor.shape[2] else tensor.narrow(2, block.start, block.rows)

    @property
    def _shared(self) -> bool:
        """Whether several head groups have gradients for the same KV heads."""
        several = sum(head_group.heads.of_keys for head_group in self.head_groups) > self.plan.kv_heads
        return several or self.tensors.get("bias", self.tensors["k"]).shape[1] == 1


class Forward(_Pass):
    """out and lse of this rank's queries. Tensors: q, k, v and optionally bias."""

    backward = False

    def compute(self, tiles: TileBatch, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, PartialRows]:
        batch = self.shapes.batch(self.kernel, tiles)
        (query,), keys = _touched(q, batch.rows), _touched(kv, batch.keys)
        out, lse = self.kernel.forward(_operands(query, keys), batch.segments, self.options)
        return {s.item: PartialRows(s.start, s.stop, _part(out, s), _part(lse, s)) for s in batch.q_spans}

    def merge(self, item: Item, shares: Sequence[PartialRows]) -> PartialRows:
        rows = self.shapes.block(item).rows
        out, lse = (_by_rows(x, rows, self.accum) for x in shares[0][2:])
        merge(shares, out, lse)
        return PartialRows(0, rows, out, lse)

    def ready(self, item: Item, shares: Sequence[PartialRows]) -> Payload | None:
        complete = len(shares) == 1 and shares[0].stop - shares[0].start == self.shapes.block(item).rows
        return shares[0][2:] if complete else None

    def write(self, item: Item, shares: Sequence[PartialRows], slots: Sequence[Tensor]) -> None:
        merge(shares, *slots)

    def arrived(self, item: Item, payload: Payload) -> PartialRows:
        return PartialRows(0, self.shapes.block(item).rows, *payload)

    def result(self, gathered: Mapping[Item, Sequence[PartialRows]]) -> Partial:
        """All rows and heads of this rank: out in the dtype of q, lying as (batch, rows, heads, head_dim), and lse."""
        q, dim = self.tensors["q"], self.tensors["v"].shape[-1]
        batch, heads, rows, _ = q.shape
        single = _only(gathered, rows)
        if single and single.out.shape[1] == heads and _is_final(single.out, self.dtype) and single.lse.dtype == self.accum:
            return Partial(single.out, single.lse.contiguous())  # the kernel's own tensors, as on a single rank
        covered = sum(self.shapes.block(item).rows * self.head_groups[item.head_group].heads.of_queries for item in gathered)
        new = torch.empty if covered == rows * heads else torch.zeros
        out = new(batch, rows, heads, dim, dtype=self.dtype, device=self.device).transpose(1, 2)
        lse = torch.empty(batch, heads, rows, dtype=self.accum, device=self.device)
        if covered < rows * heads:
            lse.fill_(-torch.inf)
        out_field, lse_field = self.shapes.fields(Kind.Q_ACC)
        for item, shares in gathered.items():
            merge(shares, self._cut(out_field, item, out), self._cut(lse_field, item, lse))
        return Partial(out, lse)


class Backward(_Pass):
    """Gradients of this rank's q, k, v and bias.

    Tensors: as in forward, and dout, lse, delta of its rows; lse is +inf where a row sees no key, so that each of its
    probabilities is exp(-inf) = 0. `out` too, where it is available: its owner then needs no surrogate.
    """

    backward = True

    def operand(self, item: Item, payload: Payload) -> Payload:
        """Add an out to queries for kernels that need one: the true one at its owner, elsewhere a surrogate, computed once."""
        if item.kind is not Kind.Q or not self.kernel.needs_out:
            return payload
        if "out" in self.tensors and self.owns(item):
            return (*payload, self._cut(_DOUT, item, self.tensors["out"]))
        return (*payload, surrogate_out(payload[1], payload[3]))

    def compute(self, tiles: TileBatch, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Sums]:
        batch = self.shapes.batch(self.kernel, tiles)
        query, dout, lse, delta, *out = _touched(q, batch.rows)
        operands, rows = _operands(query, _touched(kv, batch.keys)), Rows(dout, lse, delta, *out)
        dq, *others = self.kernel.backward(operands, rows, batch.segments, self.options)
        of_keys = [grad for grad in others if grad is not None]
        shares: dict[Item, Sums] = {s.item: (SumRows(s.start, s.stop, _part(dq, s)),) for s in batch.q_spans}
        for s in batch.kv_spans:
            shares[s.item] = tuple(SumRows(s.start, s.stop, _part(grad, s)) for grad in of_keys)
        return shares

    def merge(self, item: Item, shares: Sequence[Sums]) -> Sums:
        rows = self.shapes.block(item).rows
        totals = [_by_rows(part.values, rows, self.accum) for part in shares[0]]
        self.write(item, shares, totals)
        return tuple(SumRows(0, rows, total) for total in totals)

    def ready(self, item: Item, shares: Sequence[Sums]) -> Payload | None:
        first = shares[0][0]
        complete = len(shares) == 1 and first.stop - first.start == self.shapes.block(item).rows
        return tuple(part.values for part in shares[0]) if complete else None

    def write(self, item: Item, shares: Sequence[Sums], slots: Sequence[Tensor]) -> None:
        for parts, slot in zip(zip(*shares, strict=True), slots, strict=True):
            add(parts, slot)

    def arrived(self, item: Item, payload: Payload) -> Sums:
        rows = self.shapes.block(item).rows
        return tuple(SumRows(0, rows, values) for values in payload)

    def result(self, gathered: Mapping[Item, Sequence[Sums]]) -> Grads:
        """dq, dk, dv in the dtype of the inputs, lying as (batch, rows, heads, head_dim); dbias in the accumulation dtype."""
        names = [name for name in ("q", "k", "v", "bias") if name in self.tensors]
        grads: dict[str, Tensor] = {}
        for kind, names_of_kind in ((Kind.Q_ACC, names[:1]), (Kind.KV_ACC, names[1:])):
            items = {item: shares for item, shares in gathered.items() if item.kind is kind}
            for n, (field, name) in enumerate(zip(self.shapes.fields(kind), names_of_kind, strict=True)):
                parts = {item: [share[n] for share in shares] for item, shares in items.items()}
                grads[name] = self._gradient(field, self.tensors[name], parts)
        return Grads(grads["q"], grads["k"], grads["v"], grads.get("bias"))

    def _gradient(self, field: Field, like: Tensor, parts: Mapping[Item, Sequence[SumRows]]) -> Tensor:
        """The gradient of one tensor, from the sums that ended on this rank."""
        dtype, heads, rows = (self.accum if field.dim is None else self.dtype), like.shape[1], like.shape[2]
        single = _only(parts, rows)
        if single and single.values.shape[1] == heads and _is_final(single.values, dtype):
            return single.values
        if field.heads != "q" and self._shared:
            total = _by_rows(like, rows, self.accum).zero_()
            for item, sums in parts.items():
                target = self._cut(field, item, total)
                for part in sums:
                    target.narrow(2, part.start, part.stop - part.start).add_(part.values)
            return total.to(dtype)
        covered = sum(self.shapes.block(item).rows * self.shapes.heads(field, item.head_group)[1] for item in parts)
        total = _by_rows(like, rows, dtype)
        if covered < rows * heads:
            total.zero_()
        for item, sums in parts.items():
            add(sums, self._cut(field, item, total))
        return total


def _operands(query: Tensor, kv: Payload) -> Operands:
    return Operands(query, kv[0], kv[1], kv[2] if len(kv) > 2 else None)


def _touched(payloads: Sequence[Payload], rows: Touched) -> Payload:
    """Concatenate several blocks and take the rows that are needed."""
    joined = payloads[0] if len(payloads) == 1 else tuple(torch.cat(parts, dim=2) for parts in zip(*payloads, strict=True))
    return joined if rows.length is None else tuple(x.narrow(2, rows.start, rows.length) for x in joined)


def _part(x: Tensor, span: Span) -> Tensor:
    rows = span.stop - span.start
    return x if rows == x.shape[2] else x.narrow(2, span.first, rows)


_Share = TypeVar("_Share", PartialRows, SumRows)


def _only(gathered: Mapping[Item, Sequence[_Share]], rows: int) -> _Share | None:
    """The only share, if it covers all rows."""
    if len(gathered) == 1:
        (shares,) = gathered.values()
        if len(shares) == 1 and shares[0].stop - shares[0].start == rows:
            return shares[0]
    return None


def _is_final(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` can be returned as it is: in `dtype`, (batch, rows, heads, head_dim) in memory, and alone in its storage.

    Received tensors cannot: out and lse, or dk and dv, share a message. Results of an operator must not share storage, else an
    in-place change of one would count as a change of the other.
    """
    by_rows = x.transpose(1, 2) if x.ndim == 4 else x
    return x.dtype == dtype and by_rows.is_contiguous() and 0 < x.nbytes == x.untyped_storage().nbytes()


def _by_rows(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor (batch, heads, rows[, dim]); one with head_dim lies as (batch, rows, heads, dim)."""
    batch, heads, _, *dim = like.shape
    if not dim:
        return torch.empty(batch, heads, rows, dtype=dtype, device=like.device)
    return torch.empty(batch, rows, heads, *dim, dtype=dtype, device=like.device).transpose(1, 2)
