"""Defines the regular family of schedules at any number of ranks: heads x queries x keys, with a routing.

    ulysses u    groups of u adjacent ranks exchange rows for heads around everything else; rank = x * u + l
    a            inner ranks that a block of Q visits: a row of the grid, adjacent inner ranks
    b            inner ranks that a block of KV visits: a column of the grid

u * a * b = world. a = 1 is a ring, b = 1 is TokenRing. A member has five small values, for any number of ranks. `Inner` is the
pass between the Ulysses exchanges: one line or one grid of ranks. `rounds` defines the messages; that a member computes
attention is proved for the schedules of the same names (`schedule.check`), not here.

Bytes are closed forms. Lookaheads are those of `schedule.catalog`, so a forecast is for the schedule that would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

from ringattn.errors import PlanError
from ringattn.planner.closed_form.rounds import HeadGroup, Model, Round, TravelMode, grid, line, line_link_bytes
from ringattn.planner.closed_form.shifts import Axis, Links
from ringattn.schedule.catalog import IN_FLIGHT
from ringattn.schedule.ir import Kind
from ringattn.schedule.moves import ROUTINGS

RINGS = ("ring", "bidirectional_ring", "ring_direct", "all_gather")
NAMES = (*RINGS, "token_ring", "mesh")


@dataclass(frozen=True)
class Family:
    """One member. `name` is as in `schedule.catalog`; `routing` is "direct" for ring_direct and all_gather."""

    name: str
    ulysses: int
    a: int
    b: int
    routing: str = "hop"

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.routing not in ROUTINGS:
            raise PlanError(
                f"{self.name!r}, {self.routing!r}: choose one of {', '.join(NAMES)} and one of {', '.join(ROUTINGS)}"
            )
        if min(self.ulysses, self.a, self.b) < 1:
            raise PlanError(f"{self}: every side of the grid has at least one rank")
        if (self.name in RINGS and self.a > 1) or (self.name == "token_ring" and self.b > 1):
            raise PlanError(f"{self}: in a ring a = 1, in TokenRing b = 1; with both above 1 it is a mesh")
        if self.routing != _ROUTING.get(self.name, self.routing) or (self.name == "mesh" and self.routing == "direct"):
            raise PlanError(f"{self}: routing={self.routing!r} fits only token_ring, ring_direct and all_gather")

    @property
    def world(self) -> int:
        return self.ulysses * self.inner

    @property
    def inner(self) -> int:
        """Number of ranks that the rows of one head are cut over."""
        return self.a * self.b

    def __str__(self) -> str:
        before = [f"ulysses {self.ulysses}"] if self.ulysses > 1 else []
        grid = f"{self.name} {self.a} x {self.b}" if self.name == "mesh" else f"{self.name} {self.inner}"
        direct = ", direct" if self.name == "token_ring" and self.routing == "direct" else ""
        return " x ".join([*before, *[grid + direct][: self.inner > 1 or not before]])


_ROUTING = {"ring": "hop", "bidirectional_ring": "hop", "ring_direct": "direct", "all_gather": "direct"}


def families(world: int, heads: int) -> Iterator[Family]:
    """Every member for `world` ranks except all_gather, whose buffers grow with the sequence.

    Ulysses needs a query head for each rank of a group. Heads need not divide: the busiest rank counts.
    """
    for u in _factors(world):
        if u <= heads:
            yield from _families_inside(u, world // u)


def _families_inside(u: int, inner: int) -> Iterator[Family]:
    yield Family("ring", u, 1, inner)
    if inner == 1:
        return
    yield Family("bidirectional_ring", u, 1, inner)
    yield Family("ring_direct", u, 1, inner, "direct")
    for routing in ROUTINGS:
        yield Family("token_ring", u, inner, 1, routing)
    for a in _factors(inner):
        if 1 < a < inner:
            yield Family("mesh", u, a, inner // a)


def _factors(n: int) -> list[int]:
    low = [f for f in range(1, isqrt(n) + 1) if n % f == 0]
    return low + [n // f for f in reversed(low) if f * f != n]


class Inner:
    """One pass among the a * b ranks that hold the rows of the same heads, `rows` each.

    `shares` are the heads of the busiest rank, for each of its head groups.
    """

    def __init__(self, family: Family, model: Model, rows: int, *, backward: bool) -> None:
        self.rows, self.columns = Axis(family.a, family.ulysses), Axis(family.b, family.ulysses * family.a)
        self._family, self._count, self._backward, self._cut = family, rows, backward, 1
        head_groups = 2 if family.name == "bidirectional_ring" else 1
        if family.ulysses * model.kv_heads < head_groups:  # too few heads for two directions, which then share the keys
            self.shares, self._cut = (model,) * head_groups, head_groups
        else:
            self.shares = model.shares(family.ulysses, head_groups)
        self._lines = list(self._lines_of())

    @property
    def heads(self) -> int:
        """Query heads of the busiest rank."""
        return self.shares[0].heads if self._cut > 1 else sum(share.heads for share in self.shares)

    @property
    def merged(self) -> int:
        """Bytes of the sums that a tile adds to: those of its queries, and in backward those of its keys."""
        shares = self.shares[: 1 if self._cut > 1 else None]
        kinds = [(share, kind) for share in shares for kind in (Kind.Q, Kind.KV)]
        return sum(share.visitor(kind, self._count, backward=self._backward).partial for share, kind in kinds)

    def stays(self, kind: Kind) -> bool:
        """Whether blocks of `kind` stay at their rank, so that their results are complete with the last tile."""
        return (self.rows if kind is Kind.Q else self.columns).size == 1

    @property
    def wide(self) -> bool:
        """Whether gradients of KV accumulate on the way: with two ranks the first hop reaches the owner."""
        return self._family.name in ("ring", "bidirectional_ring") and self.columns.size > 2

    @property
    def link_bytes(self) -> int:
        """Bytes on the busiest directed link; no two lines share one."""
        return max(line_link_bytes(axis.size, head_groups, way) for axis, head_groups, way in self._lines)

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        return sum((axis.size - 1) * (v.out + v.back) for axis, head_groups, _ in self._lines for v, _ in head_groups)

    def rounds(self, links: Links) -> Iterator[Round]:
        """The rounds of one rank."""
        if len(self._lines) == 1:
            ((axis, head_groups, way),) = self._lines
            return line(axis, head_groups, way, links)
        ((rows, ((q, _),), _), (columns, ((kv, _),), _)) = self._lines
        return grid(rows, columns, q, kv, links)

    def _lines_of(self) -> Iterator[tuple[Axis, tuple[HeadGroup, ...], TravelMode]]:
        (a, b), direct = (self.rows.size, self.columns.size), self._family.routing == "direct"
        match self._family.name:
            case "ring" | "bidirectional_ring":
                yield self.columns, tuple(map(self._kv, self.shares, (1, -1))), TravelMode(accumulates=True)
            case "ring_direct" | "all_gather":
                ahead = b - 1 if self._family.name == "all_gather" else min(IN_FLIGHT, b - 1)
                yield self.columns, (self._kv(self.shares[0]),), TravelMode(direct, max(1, ahead))
            case "token_ring":
                yield self.rows, (self._q(),), TravelMode(direct, max(1, min(IN_FLIGHT, a - 1)) if direct else 1)
            case _:
                if a > 1 or b == 1:
                    yield self.rows, (self._q(),), TravelMode()
                if b > 1:
                    yield self.columns, (self._kv(self.shares[0]),), TravelMode(ahead=2)

    def _q(self) -> HeadGroup:
        return self.shares[0].visitor(Kind.Q, self._count, backward=self._backward), 1

    def _kv(self, share: Model, turn: int = 1) -> HeadGroup:
        return share.visitor(Kind.KV, -(-self._count // self._cut), backward=self._backward, accumulates=self.wide), turn
