"""What happens between the Ulysses exchanges: one line or one grid of ranks, made of the member's five values.

Bytes are closed forms. Lookaheads are those of `schedule.named`, so that a forecast is of the schedule that would run.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringattn.forecast.family import Family
from ringattn.forecast.payloads import Model
from ringattn.forecast.rounds import Lane, Round, Way, grid, line, line_link_bytes
from ringattn.forecast.shifts import Axis, Links
from ringattn.schedule.ir import Kind
from ringattn.schedule.named import IN_FLIGHT


class Inner:
    """One pass among the a * b ranks that hold the rows of the same heads, `rows` each.

    `shares` are the heads of the busiest of them, for each of its lanes.
    """

    def __init__(self, family: Family, model: Model, rows: int, *, backward: bool) -> None:
        self.rows, self.columns = Axis(family.a, family.ulysses), Axis(family.b, family.ulysses * family.a)
        self._family, self._count, self._backward, self._cut = family, rows, backward, 1
        lanes = 2 if family.name == "bidirectional_ring" else 1
        if family.ulysses * model.kv_heads < lanes:  # too few heads for two directions: they share the keys
            self.shares, self._cut = (model,) * lanes, lanes
        else:
            self.shares = model.shares(family.ulysses, lanes)
        self._lines = list(self._lines_of())

    @property
    def heads(self) -> int:
        """Query heads of the busiest rank."""
        return self.shares[0].heads if self._cut > 1 else sum(share.heads for share in self.shares)

    @property
    def merged(self) -> int:
        """Bytes of the sums that a tile adds to: those of its queries, and in backward those of its keys."""
        every = self.shares[: 1 if self._cut > 1 else None]
        kinds = [(share, kind) for share in every for kind in (Kind.Q, Kind.KV)]
        return sum(share.visitor(kind, self._count, backward=self._backward).partial for share, kind in kinds)

    def stays(self, kind: Kind) -> bool:
        """Whether blocks of `kind` stay where they are, so that their results are complete with the last tile."""
        return (self.rows if kind is Kind.Q else self.columns).size == 1

    @property
    def wide(self) -> bool:
        """Whether gradients of KV gather on their way: over two ranks the first hop is home."""
        return self._family.name in ("ring", "bidirectional_ring") and self.columns.size > 2

    @property
    def link_bytes(self) -> int:
        """On the busiest directed link; no two lines share one."""
        return max(line_link_bytes(axis.size, lanes, way) for axis, lanes, way in self._lines)

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        return sum((axis.size - 1) * (v.out + v.home) for axis, lanes, _ in self._lines for v, _ in lanes)

    def rounds(self, links: Links) -> Iterator[Round]:
        """What one rank does."""
        if len(self._lines) == 1:
            ((axis, lanes, way),) = self._lines
            return line(axis, lanes, way, links)
        ((rows, ((q, _),), _), (columns, ((kv, _),), _)) = self._lines
        return grid(rows, columns, q, kv, links)

    def _lines_of(self) -> Iterator[tuple[Axis, tuple[Lane, ...], Way]]:
        (a, b), direct = (self.rows.size, self.columns.size), self._family.routing == "direct"
        match self._family.name:
            case "ring" | "bidirectional_ring":
                yield self.columns, tuple(map(self._kv, self.shares, (1, -1))), Way(rides=True)
            case "ring_direct" | "all_gather":
                ahead = b - 1 if self._family.name == "all_gather" else min(IN_FLIGHT, b - 1)
                yield self.columns, (self._kv(self.shares[0]),), Way(direct, max(1, ahead))
            case "token_ring":
                yield self.rows, (self._q(),), Way(direct, max(1, min(IN_FLIGHT, a - 1)) if direct else 1)
            case _:
                if a > 1 or b == 1:
                    yield self.rows, (self._q(),), Way()
                if b > 1:
                    yield self.columns, (self._kv(self.shares[0]),), Way(ahead=2)

    def _q(self) -> Lane:
        return self.shares[0].visitor(Kind.Q, self._count, backward=self._backward), 1

    def _kv(self, share: Model, turn: int = 1) -> Lane:
        return share.visitor(Kind.KV, -(-self._count // self._cut), backward=self._backward, rides=self.wide), turn
