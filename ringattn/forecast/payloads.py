"""Bytes of what travels, from the one table in `payload`, for the heads that a rank works on.

Ulysses deals the heads out: `Model.shares` is what the busiest rank of a group gets, at least one head of KV. An `Exchange` is
what its all-to-all carries there and back. No schedule and no topology is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ringattn.cost import ITEMSIZE
from ringattn.forecast.rounds import Visitor
from ringattn.lanes import share_heads
from ringattn.payload import Field, fields
from ringattn.schedule.ir import Kind

RESULT = {Kind.Q: Kind.Q_ACC, Kind.KV: Kind.KV_ACC}


@dataclass(frozen=True)
class Model:
    """The heads one rank works on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    batch: int

    def shares(self, ulysses: int, lanes: int = 1) -> tuple[Model, ...]:
        """Of the busiest rank in a group of `ulysses`, for each of its `lanes`."""
        dealt = [
            replace(self, heads=sum(part.of_queries for part in parts), kv_heads=sum(part.of_keys for part in parts))
            for parts in share_heads(self.heads, self.kv_heads, ulysses * lanes)
        ]
        members = [tuple(dealt[first : first + lanes]) for first in range(0, len(dealt), lanes)]
        return max(members, key=lambda member: sum(share.heads + share.kv_heads for share in member))

    def row(self, found: Iterable[Field], *, wide: bool = False) -> int:
        """Bytes of one row of `found`. `wide`: sums as they are kept, not as they travel once rounded."""
        narrow, broad = ITEMSIZE[self.dtype], max(4, ITEMSIZE[self.dtype])
        heads = {"q": self.heads, "kv": self.kv_heads}
        return self.batch * sum(
            heads[field.heads] * (broad if field.wide or wide else narrow) * (self.head_dim if field.dim else 1)
            for field in found
        )

    def visitor(self, kind: Kind, rows: int, *, backward: bool, rides: bool = False) -> Visitor:
        """A block of `rows` rows of `kind` as it visits; what rides gathers on its way, and so stays wide."""
        there = fields(kind, backward=backward, bias=False)
        back = fields(RESULT[kind], backward=backward, bias=False)
        return Visitor(rows * self.row(there), rows * self.row(back, wide=rides), rows * self.row(back, wide=True))


@dataclass(frozen=True)
class Exchange:
    """Bytes that each rank of a Ulysses group sends to each other one, before and after, and what it holds of it in between."""

    there: int
    back: dict[Kind, int]  # results of queries, and of keys and values
    inputs: int
    results: int

    @staticmethod
    def of(shares: Sequence[Model], ulysses: int, rows: int, *, backward: bool, wide: bool) -> Exchange:
        """q, k, v there and out, lse back; in backward q, k, v are kept from forward: dout, lse, delta there, dq, dk, dv back.

        `wide`: dk and dv have gathered on their way, and stay as they are on the last leg home.
        """
        if ulysses == 1:
            return Exchange(0, {Kind.Q: 0, Kind.KV: 0}, 0, 0)
        q, kv = fields(Kind.Q, backward=backward, bias=False), fields(Kind.KV, backward=backward, bias=False)
        result, kv_result = (fields(RESULT[kind], backward=backward, bias=False) for kind in (Kind.Q, Kind.KV))
        there = fields(Kind.Q, backward=True, bias=False, new=True) if backward else (*q, *kv)
        return Exchange(
            there=rows * sum(share.row(there) for share in shares),
            back={
                Kind.Q: rows * sum(share.row(result) for share in shares),
                Kind.KV: rows * sum(share.row(kv_result, wide=wide) for share in shares),
            },
            inputs=rows * sum(share.row((*q, *kv)) for share in shares),
            results=rows * sum(share.row((*result, *kv_result), wide=True) for share in shares),
        )
