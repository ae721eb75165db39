"""The regular family of schedules at any number of ranks: heads x queries x keys, and how things travel.

    ulysses u    groups of u adjacent ranks trade rows for heads around everything else; rank = x * u + l
    a            inner ranks that a block of Q visits: a row of the grid, adjacent inner ranks
    b            inner ranks that a block of KV visits: a column of the grid

u * a * b = world. a = 1 is a ring, b = 1 is TokenRing. A member is five small values, whatever the number of ranks. What it
sends is in `rounds`; that it computes attention is proved for the schedules of the same names (`schedule.check`), not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

from ringattn.errors import PlanError
from ringattn.schedule.routes import ROUTINGS

RINGS = ("ring", "bidirectional_ring", "ring_direct", "all_gather")
NAMES = (*RINGS, "token_ring", "mesh")


@dataclass(frozen=True)
class Family:
    """One member. `name` is as in `schedule.named`; `routing` is "direct" for ring_direct and all_gather."""

    name: str
    ulysses: int
    a: int
    b: int
    routing: str = "hop"

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.routing not in ROUTINGS:
            raise PlanError(f"{self.name!r}, {self.routing!r}: choose of {', '.join(NAMES)} and of {', '.join(ROUTINGS)}")
        if min(self.ulysses, self.a, self.b) < 1:
            raise PlanError(f"{self}: every side of the grid has at least one rank")
        if (self.name in RINGS and self.a > 1) or (self.name == "token_ring" and self.b > 1):
            raise PlanError(f"{self}: in a ring a = 1, in TokenRing b = 1; both above 1 is a mesh")
        if self.routing != _ROUTING.get(self.name, self.routing) or (self.name == "mesh" and self.routing == "direct"):
            raise PlanError(f"{self}: routing={self.routing!r} goes with token_ring, ring_direct and all_gather")

    @property
    def world(self) -> int:
        return self.ulysses * self.inner

    @property
    def inner(self) -> int:
        """Ranks among which the rows of one head are cut."""
        return self.a * self.b

    def __str__(self) -> str:
        before = [f"ulysses {self.ulysses}"] if self.ulysses > 1 else []
        grid = f"{self.name} {self.a} x {self.b}" if self.name == "mesh" else f"{self.name} {self.inner}"
        direct = ", direct" if self.name == "token_ring" and self.routing == "direct" else ""
        return " x ".join([*before, *[grid + direct][: self.inner > 1 or not before]])


_ROUTING = {"ring": "hop", "bidirectional_ring": "hop", "ring_direct": "direct", "all_gather": "direct"}


def families(world: int, heads: int) -> Iterator[Family]:
    """Every member for `world` ranks, but for all_gather, whose buffers grow with the whole sequence.

    Ulysses needs a query head for each rank of a group. Nothing has to divide: where heads do not, the busiest rank counts.
    """
    for u in _factors(world):
        if u <= heads:
            yield from _around(u, world // u)


def _around(u: int, inner: int) -> Iterator[Family]:
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
