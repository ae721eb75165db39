"""Bytes of what travels, from the one table in `payload`, for the heads that a rank works on.

Ulysses deals the heads out: `Model.share` is what one rank of a group gets, at least one head of KV. An `Exchange` is what its
all-to-all carries there and back. No schedule and no topology is known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ringattn.cost import ITEMSIZE
from ringattn.forecast.rounds import Visitor
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

    def share(self, ulysses: int) -> Model:
        """Of each rank in a group of `ulysses`."""
        return replace(self, heads=self.heads // ulysses, kv_heads=max(1, self.kv_heads // ulysses))

    def lanes(self) -> tuple[tuple[Model, int], ...]:
        """Halves of the KV heads with their query heads; or twice all of them, each with every second row of keys."""
        if self.kv_heads == 1:
            return (self, 2), (self, 2)
        small, group = self.kv_heads // 2, self.heads // self.kv_heads
        return tuple((replace(self, heads=n * group, kv_heads=n), 1) for n in (self.kv_heads - small, small))

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
    """Bytes that each rank of a Ulysses group sends to each other one, before and after, and that it keeps in between."""

    there: int
    back: int
    kept: int

    @staticmethod
    def of(share: Model, ulysses: int, rows: int, *, backward: bool, wide: bool) -> Exchange:
        """q, k, v there and out, lse back; in backward q, k, v are kept from forward: dout, lse, delta there, dq, dk, dv back.

        `wide`: dk and dv have gathered on their way, and stay as they are on the last leg home.
        """
        q, kv = fields(Kind.Q, backward=backward, bias=False), fields(Kind.KV, backward=backward, bias=False)
        result, kv_result = (fields(RESULT[kind], backward=backward, bias=False) for kind in (Kind.Q, Kind.KV))
        there = [field for field in (*q, *kv) if not backward or field.name not in ("q", "k", "v")]
        kept = ulysses * rows * share.row((*q, *kv)) if ulysses > 1 else 0
        return Exchange(rows * share.row(there), rows * (share.row(result) + share.row(kv_result, wide=wide)), kept)
