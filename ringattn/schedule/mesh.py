"""Builds mesh attention: ranks form a grid of a columns and b rows; Q moves along rows, KV along columns.

    a = 3, b = 2, rank = y * a + x     rank (x, y) computes every tile (i, j) with i from its row and j from its column:
                                       Q[i] of rank (xi, yi) and KV[j] of rank (xj, yj) are both at rank (xj, yi), only there
    0  1  2     Q of 0 visits 0, 1, 2
    3  4  5     KV of 0 visits 0, 3    step = visit of Q * b + visit of KV

A rank receives a - 1 blocks of Q and b - 1 of KV instead of world - 1 of either: O(sqrt(world)) traffic, at the price of
keeping the b - 1 foreign blocks of KV and their gradients. a = 1 is a ring, b = 1 is TokenRing. With a = ranks in a node it has
two levels: queries stay inside the node, and only KV crosses between nodes.

Along either axis a block hops from neighbour to neighbour or moves straight from its owner to all others. KV moves around once,
during the first visit, and is kept; each partial result of Q leaves after its visit. Gradients of KV accumulate where the block
is kept and leave in the last visit, which ends with the rank's own KV, so that they travel beside it.
The same volume argument as 2.5D matrix products; as attention: Mesh-Attention, https://arxiv.org/abs/2512.20968.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import isqrt

from ringattn._validation import as_int, one_of, short_repr
from ringattn.errors import PlanError
from ringattn.schedule.ir import BufferLimits, Kind, Move, Schedule, Tile, make
from ringattn.schedule.moves import ROUTINGS, validate

AHEAD = 3  # how many visits before its use a block may leave its owner with direct routing


def mesh(world: int, *, a: int | None = None, q_routing: str = "hop", kv_routing: str = "hop") -> Schedule:
    """Q visits the `a` ranks of its row, KV the world / a ranks of its column.

    Args:
        world: number of ranks.
        a: ranks in a row. By default the largest factor of `world` not above its square root: of two equally square grids the
            one that moves less Q moves fewer bytes, since a visit of Q costs q and out, and a visit of KV costs k and v of at
            most as many heads.
        q_routing: "hop" or "direct", along rows.
        kv_routing: "hop" or "direct", along columns.

    Raises:
        PlanError: `a` does not divide `world`, or an argument is out of range.
    """
    world, _ = validate(world, "hop", 1, 1)
    for name, routing in (("q_routing", q_routing), ("kv_routing", kv_routing)):
        one_of(name, routing, ROUTINGS, PlanError)
    a = max(factors(world, upto=isqrt(world))) if a is None else as_int("a", a, PlanError)
    if a < 1 or world % a:
        raise PlanError(
            f"a={short_repr(a)}: the ranks of a row must divide world={world}; choose one of {factors(world, upto=world)}"
        )
    grid = _Grid(a, world // a, q_routing == "direct", kv_routing == "direct")
    straight = [word for word, direct in (("q", grid.q_direct), ("kv", grid.kv_direct)) if direct]
    name = "_".join(["mesh", *straight, *["direct"][: len(straight)]])
    return make(name, world, grid.tiles(), [*grid.kv(), *grid.q(), *grid.q_acc(), *grid.kv_acc()], grid.limits())


def factors(world: int, *, upto: int) -> list[int]:
    """The factors of `world` not above `upto`."""
    return [n for n in range(1, upto + 1) if world % n == 0]


class _Grid:
    def __init__(self, a: int, b: int, q_direct: bool, kv_direct: bool) -> None:
        self.a, self.b = a, b
        self.q_direct, self.kv_direct = q_direct, kv_direct
        self.end = a * b + 1  # the step in which the last results are taken in

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """x, y and number of every rank."""
        return ((x, y, self.rank(x, y)) for y, x in product(range(self.b), range(self.a)))

    def rank(self, x: int, y: int) -> int:
        return y % self.b * self.a + x % self.a

    def step(self, n: int, m: int) -> int:
        """The step of visit n of Q and visit m of KV: own KV is first in the first visit, later last."""
        return n * self.b + (m if n == 0 else (m - 1) % self.b)

    def tiles(self) -> Iterator[Tile]:
        for x, y, rank in self:
            for n, m in product(range(self.a), range(self.b)):
                yield Tile(self.step(n, m), rank, self.rank(x - n, y), self.rank(x, y - m))

    def kv(self) -> Iterator[Move]:
        for (x, y, rank), m in product(self, range(1, self.b)):
            src, depart = (rank, max(0, m - AHEAD)) if self.kv_direct else (self.rank(x, y + m - 1), m - 1)
            yield Move(Kind.KV, rank, src, self.rank(x, y + m), depart, m)

    def q(self) -> Iterator[Move]:
        for (x, y, rank), n in product(self, range(1, self.a)):
            src, depart = (rank, max(0, n - AHEAD)) if self.q_direct else (self.rank(x + n - 1, y), n - 1)
            yield Move(Kind.Q, rank, src, self.rank(x + n, y), depart * self.b, n * self.b)

    def q_acc(self) -> Iterator[Move]:
        for (x, y, rank), n in product(self, range(1, self.a)):
            depart = (n + 1) * self.b
            yield Move(Kind.Q_ACC, rank, self.rank(x + n, y), rank, depart, min(depart + self.b, self.end))

    def kv_acc(self) -> Iterator[Move]:
        for (x, y, rank), m in product(self, range(1, self.b)):
            depart = self.step(self.a - 1, m) + 1
            yield Move(Kind.KV_ACC, rank, self.rank(x, y + m), rank, depart, min(depart + 2, self.end))

    def limits(self) -> BufferLimits:
        """Q: one block in use, one in flight, one more of results. KV: all, all gradients, and two of these in flight."""
        foreign_q, foreign_kv = self.a - 1, self.b - 1
        passing_on = self.a == 1  # with a single visit of Q no block of KV is needed twice
        return BufferLimits(
            q=min(foreign_q, AHEAD + 1 if self.q_direct else 2),
            kv=min(foreign_kv, AHEAD + 1 if self.kv_direct else 2) if passing_on else foreign_kv,
            q_acc=min(foreign_q, 1) * min(self.a, 3),
            kv_acc=min(foreign_kv, 2) + (min(foreign_kv, 3) if passing_on else foreign_kv),
        )
