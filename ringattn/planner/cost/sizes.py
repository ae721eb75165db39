"""Computes the bytes of every item of a pass: in messages, between messages, on every directed link, and at peak.

Bytes are counted, not estimated, from the table in `wire_fields` from which `blocks` builds its tensors. No time and no links
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ringattn.plan.plan import Plan
from ringattn.plan.wire_fields import Field, fields
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Message, Step

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes


class Sizes:
    """Bytes of every item of one pass, in messages and between messages.

    `bias_heads`: heads of key_bias, which travels with KV: 0 when there is none, 1 when all heads share it, else kv_heads.
    Values are assumed to have the head_dim of queries.
    """

    def __init__(self, plan: Plan, *, batch: int = 1, backward: bool = False, bias_heads: int = 0) -> None:
        self.plan, self.batch, self.backward, self.bias_heads = plan, batch, backward, bias_heads
        self.head_groups = plan.backward if backward else plan.forward
        narrow, wide = ITEMSIZE[plan.dtype], max(4, ITEMSIZE[plan.dtype])  # sums, lse, delta and biases are wide: fp32, or fp64
        wire = {
            (n, kind): narrow if not kind.moved or plan.rounds_on_wire(head_group, kind) else wide
            for n, head_group in enumerate(self.head_groups)
            for kind in Kind
        }
        self._travelling = {
            (*key, new): self._per_row(*key, size, wide, bias_heads, new) for key, size in wire.items() for new in (False, True)
        }
        self._rows = [
            ([b.rows for b in head_group.kv_blocks], [b.rows for b in head_group.q_blocks]) for head_group in self.head_groups
        ]
        self._stored = {key: self._per_row(*key, wide if key[1].moved else narrow, wide, bias_heads) for key in wire}
        self._share = {key: self._per_row(*key, narrow, wide, bias_heads) for key in wire}

    def travelling(self, item: Item) -> int:
        """Bytes of `item` in a message."""
        return (
            self._rows[item.head_group][item.kind.of_queries][item.index]
            * self._travelling[item.head_group, item.kind, item.new]
        )

    def stored(self, item: Item) -> int:
        """Bytes of `item` between messages: sums are wide."""
        return self._rows[item.head_group][item.kind.of_queries][item.index] * self._stored[item.head_group, item.kind]

    def fields(self, item: Item) -> tuple[Field, ...]:
        """The tensors of `item` in a message."""
        return fields(item.kind, backward=self.backward, bias=self.bias_heads > 0, new=item.new)

    def share(self, item: Item, rows: int) -> int:
        """Bytes of the result of one kernel call for `rows` rows of accumulator `item`, in the dtype of the kernel."""
        return rows * self._share[item.head_group, item.kind]

    def _per_row(self, head_group: int, kind: Kind, itemsize: int, wide: int, bias_heads: int, new: bool = False) -> int:
        """Bytes of one row, over all heads of the head group."""
        of = self.head_groups[head_group].heads
        heads = {"q": of.of_queries, "kv": of.of_keys, "bias": of.of_keys if bias_heads > 1 else bias_heads}
        return self.batch * sum(
            heads[field.heads] * (wide if field.wide else itemsize) * (self.plan.head_dim if field.dim else 1)
            for field in fields(kind, backward=self.backward, bias=bias_heads > 0, new=new)
        )


def traffic(plan: Plan, *, batch: int = 1, backward: bool = False, bias_heads: int = 0) -> dict[tuple[int, int], int]:
    """Bytes on every directed link that one pass uses: exactly what a transport counts."""
    sizes = Sizes(plan, batch=batch, backward=backward, bias_heads=bias_heads)
    links: Counter[tuple[int, int]] = Counter()
    for message in plan.messages(backward=backward):
        links[message.src, message.dst] += sum(map(sizes.travelling, message.items))
    return dict(links)


def peak_bytes(program: Iterable[Step], rank: int, sizes: Sizes) -> int:
    """The most bytes `rank` holds at once beyond its own rows: message buffers, foreign inputs, partial results for others."""
    held_bytes: dict[Item | Message, int] = {}
    peak = 0
    for step in program:
        for message in step.arrival:
            del held_bytes[message]
            if message.dst == rank:
                complete = (item._replace(new=False) for item in message.items if _owner(sizes, item) != rank)
                held_bytes.update((item, sizes.stored(item)) for item in complete)
        for message in step.post:
            held_bytes[message] = sum(map(sizes.travelling, message.items))
            for item in message.items if message.src == rank else ():
                if item.kind.moved:
                    held_bytes.pop(item, None)
        for batch in step.tiles:
            results = [Item(batch.head_group, Kind.Q_ACC, i) for i in batch.i] + [
                Item(batch.head_group, Kind.KV_ACC, j) for j in batch.j
            ]
            for item in results:
                if _owner(sizes, item) != rank and (sizes.backward or item.kind is Kind.Q_ACC):
                    held_bytes[item] = sizes.stored(item)
        peak = max(peak, sum(held_bytes.values()))
        for item in step.release:
            held_bytes.pop(item, None)
    return peak


def _owner(sizes: Sizes, item: Item) -> int:
    return sizes.head_groups[item.head_group].schedule.owner(item.kind, item.index)
