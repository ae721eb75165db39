"""Computes the shapes of everything that one pass of a plan handles: blocks, messages, and the rows that tiles touch.

They follow from the plan and the shapes of its inputs alone, so they are computed once and reused in every call of the same
kind, by every layer of a model. `blocks` holds the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ringattn.comm.wire_format import Spec, Wire
from ringattn.kernels import Kernel
from ringattn.kernels.base import Prepared
from ringattn.kernels.lse import accum_dtype
from ringattn.plan.head_groups import Block
from ringattn.plan.plan import Plan
from ringattn.plan.wire_fields import Field, fields
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item
from ringattn.schedule.program import TileBatch as TileBatch
from ringattn.sequence.segments import Segment


class InputSizes(NamedTuple):
    """The sizes of the inputs, from which all shapes follow together with the plan."""

    batch: int
    value_dim: int
    dtype: torch.dtype
    bias_heads: int  # 0 where there is no key_bias, 1 where all heads share it, else kv_heads


class Touched(NamedTuple):
    """Rows [start, start + length) of some concatenated blocks; `length` None means all rows."""

    start: int
    length: int | None


class Span(NamedTuple):
    """Rows [first, first + stop - start) of a kernel's result are rows [start, stop) of `item`."""

    item: Item
    first: int
    start: int
    stop: int


class Batch(NamedTuple):
    """One kernel call: only the rows and keys that its segments touch, half of them in many zigzag tiles."""

    segments: Prepared
    rows: Touched
    keys: Touched
    q_spans: tuple[Span, ...]
    kv_spans: tuple[Span, ...]


class Shapes:
    """The shapes of one pass. Created by `shapes_of`, which caches it."""

    def __init__(self, plan: Plan, inputs: InputSizes, *, backward: bool) -> None:
        self.plan, self.inputs, self.backward = plan, inputs, backward
        self.head_groups = plan.backward if backward else plan.forward
        self.accum = accum_dtype(inputs.dtype)
        self._wires: dict[tuple[Item, ...], Wire] = {}
        self._batches: dict[tuple[Kernel, TileBatch], Batch] = {}

    def fields(self, kind: Kind, *, new: bool = False) -> tuple[Field, ...]:
        return fields(kind, backward=self.backward, bias=self.inputs.bias_heads > 0, new=new)

    def block(self, item: Item) -> Block:
        return self.head_groups[item.head_group].block(item.kind, item.index)

    def wire(self, items: tuple[Item, ...]) -> Wire:
        """The layout of a message that carries `items`."""
        wire = self._wires.get(items)
        if wire is None:
            wire = self._wires[items] = Wire(spec for item in items for spec in self.specs(item))
        return wire

    def specs(self, item: Item) -> list[Spec]:
        """Shapes and dtypes of `item` on the wire, whichever rank sends it."""
        return [self._spec(field, item) for field in self.fields(item.kind, new=item.new)]

    def heads(self, field: Field, head_group: int) -> tuple[int, int]:
        """First head and number of heads of `field` that this head group has."""
        heads = self.head_groups[head_group].heads
        if field.heads == "q":
            return heads.q_start, heads.of_queries
        if field.heads == "bias" and self.inputs.bias_heads == 1:
            return 0, 1
        return heads.kv_start, heads.of_keys

    def batch(self, kernel: Kernel, tiles: TileBatch) -> Batch:
        """The kernel call that computes `tiles`."""
        batch = self._batches.get((kernel, tiles))
        if batch is None:
            batch = self._batches[kernel, tiles] = self._make_batch(kernel, tiles)
        return batch

    def _make_batch(self, kernel: Kernel, tiles: TileBatch) -> Batch:
        segments = self.head_groups[tiles.head_group].segments(tiles)
        sides: list[tuple[Touched, tuple[Span, ...]]] = []
        for kind, indices, runs in (
            (Kind.Q_ACC, tiles.i, [(p.q_start, p.q_stop) for p in segments]),
            (Kind.KV_ACC, tiles.j, [(p.k_start, p.k_stop) for p in segments]),
        ):
            items = [Item(tiles.head_group, kind, index) for index in indices]
            sizes = [self.block(item).rows for item in items]
            first, stop = (min(a for a, _ in runs), max(b for _, b in runs)) if runs else (0, 0)
            touched = Touched(first, None) if (first, stop) == (0, sum(sizes)) else Touched(first, stop - first)
            sides.append((touched, _spans(items, sizes, first, stop)))
        (rows, q_spans), (keys, kv_spans) = sides
        shifted = [_shifted(segment, rows.start, keys.start) for segment in segments]
        return Batch(kernel.prepare(shifted), rows, keys, q_spans, kv_spans)

    def _spec(self, field: Field, item: Item) -> Spec:
        dims = () if field.dim is None else (self.plan.head_dim if field.dim == "qk" else self.inputs.value_dim,)
        narrow = not item.kind.moved or self.plan.rounds_on_wire(self.head_groups[item.head_group], item.kind)
        dtype = self.inputs.dtype if narrow and not field.wide else self.accum
        return Spec((self.inputs.batch, self.heads(field, item.head_group)[1], self.block(item).rows, *dims), dtype)


@lru_cache(maxsize=128)
def shapes_of(plan: Plan, inputs: InputSizes, *, backward: bool) -> Shapes:
    """The shapes of one pass, computed once for all ranks that this process hosts and all calls of this kind."""
    return Shapes(plan, inputs, backward=backward)


def _spans(items: Sequence[Item], sizes: Sequence[int], first: int, stop: int) -> tuple[Span, ...]:
    """The part of each block within rows [first, stop) of the concatenated blocks; an empty span where there is none."""
    spans, start = [], 0
    for item, size in zip(items, sizes, strict=True):
        begin, end = max(first, start), min(stop, start + size)
        spans.append(Span(item, begin - first, begin - start, end - start) if begin < end else Span(item, 0, 0, 0))
        start += size
    return tuple(spans)


def _shifted(segment: Segment, rows: int, keys: int) -> Segment:
    return segment._replace(
        q_start=segment.q_start - rows,
        q_stop=segment.q_stop - rows,
        k_start=segment.k_start - keys,
        k_stop=segment.k_stop - keys,
    )
