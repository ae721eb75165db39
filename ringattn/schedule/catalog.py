"""Schedules by name, each with the variants among which the planner picks by price.

    ring                 KV from neighbour to neighbour, either way round
    bidirectional_ring   half of the heads each way
    ring_direct          KV from its owner straight to each rank, a few at a time
    token_ring           Q to neighbours or straight to each rank, partial results straight home; or half of the heads each way
    accumulating_ring    Q to neighbours, and one result that rides along and gathers
    mesh                 Q along rows, KV along columns, hopping or direct; a few sensible grids
    all_gather           KV from its owner to all ranks at once: one exchange, and buffers as large as the whole sequence

Each of them also inside Ulysses, in which groups of ranks trade sequence for heads (see `schedule.ulysses`); the name is then
that of what runs among the groups.

`balanced` is made for a mask and a layout, so it is not here: see `planner.solver` and the planner.

What travels may be cut into parts that go by themselves: halves, of which a mask may leave one unread, quarters, so that the
first tile starts and the first result leaves early, or trimmed to what another rank needs at all (see `lanes.trim`). Within a
name and among names, what needs less room stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isqrt

from ringattn.schedule.interleave import take_turns
from ringattn.schedule.ir import Schedule
from ringattn.schedule.mesh import factors, mesh
from ringattn.schedule.ring import bidirectional_ring, ring
from ringattn.schedule.token_ring import accumulating_ring, token_ring
from ringattn.schedule.transforms import both_ways, divide, split
from ringattn.schedule.ulysses import ulysses

TRIMMED = 3  # parts: what others need, and what there is before and behind
IN_FLIGHT = 4  # peers that a direct schedule sends to at once

Lanes = tuple[Schedule, ...]


@dataclass(frozen=True)
class Named:
    """One variant of a named schedule."""

    name: str
    variant: str
    lanes: Lanes
    trimmed: bool = False  # its blocks are to be cut where a layout knows rows that no other rank needs

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


@dataclass(frozen=True)
class Facts:
    """What the choice of variants depends on. `node_size` is 1 where ranks do not stand in nodes."""

    world: int
    heads: int
    kv_heads: int
    node_size: int = 1
    directions: tuple[int, ...] = (1, -1)
    parts: tuple[int, ...] = (1,)
    trimmed: tuple[str, ...] = ()  # "q", "kv": of which a layout has rows that no other rank needs

    def inside(self, degree: int) -> Facts:
        """What is left to a schedule that runs inside Ulysses of `degree`."""
        node = self.node_size // degree if self.node_size % degree == 0 else 1
        of_one = max(1, self.heads // degree), max(1, self.kv_heads // degree)
        narrowed = replace(self, directions=self.directions[-1:], parts=self.parts[-1:])  # those that move least in most cases
        return replace(narrowed, world=self.world // degree, heads=of_one[0], kv_heads=of_one[1], node_size=node)


def named(name: str, facts: Facts, degree: int = 1) -> Iterator[Named]:
    """The variants of `name`, one of `NAMES`, inside Ulysses of `degree`."""
    if degree == 1:
        for variant, lanes, trimmed in _and_trimmed(NAMES[name](facts), facts):
            yield Named(name, variant, lanes, trimmed)
        return
    inside = facts.inside(degree)
    groups = [n for n in (1, 2, 4) if facts.kv_heads % (degree * n) == 0] or [1]
    if inside.world == 1:
        for n in groups:
            for parts in (1, 2, 4):
                exchange = split(ring(1), q=parts) if parts > 1 else ring(1)
                yield Named(f"ulysses {degree}", _words("", parts, n), ulysses(exchange, degree, groups=n))
            yield Named(f"ulysses {degree}", _words("in stages", 1, n), ulysses(ring(1), degree, stages=degree - 1, groups=n))
        return
    for variant, lanes, trimmed in _and_trimmed(NAMES[name](inside), inside):
        for n in groups if facts.kv_heads >= degree * len(lanes) else [1]:
            wrapped = zip(*(ulysses(lane, degree, stages=degree - 1, groups=n) for lane in lanes), strict=True)
            found = tuple(lane for member in wrapped for lane in member)
            yield Named(name, _words(f"ulysses {degree}, {variant}", 1, n), found, trimmed)


def _and_trimmed(variants: Variants, facts: Facts) -> Iterator[tuple[str, Lanes, bool]]:
    """Each as it is, and if its blocks are whole and some of what travels is not needed, without that."""
    for variant, lanes in variants:
        yield variant, lanes, False
        moving = {"q" if move.kind.of_queries else "kv" for lane in lanes for move in lane.moves} & set(facts.trimmed)
        if moving and all(len(lane.q_home) == len(lane.kv_home) == lane.world for lane in lanes):
            divided = tuple(divide(lane, **dict.fromkeys(moving, TRIMMED)) for lane in lanes)
            yield ", ".join(filter(None, (variant, "trimmed"))), divided, True


def _words(variant: str, parts: int, groups: int) -> str:
    words = [variant, f"{parts} parts" if parts > 1 else "", f"{groups} groups" if groups > 1 else ""]
    return ", ".join(filter(None, words))


Variants = Iterator[tuple[str, Lanes]]


def _ring(facts: Facts) -> Variants:
    for direction in facts.directions:
        yield from _cut("kv", facts, "hop", direction, ring(facts.world, direction=direction))


def _bidirectional_ring(facts: Facts) -> Variants:
    yield "hop", bidirectional_ring(facts.world)


def _ring_direct(facts: Facts) -> Variants:
    ahead = max(1, min(IN_FLIGHT, facts.world - 1))
    for direction in facts.directions:
        schedule = ring(facts.world, routing="direct", direction=direction, lookahead=ahead)
        yield from _cut("kv", facts, "direct", direction, schedule)


def _token_ring(facts: Facts) -> Variants:
    for routing in ("hop", "direct"):
        for direction in facts.directions:
            yield from _cut("q", facts, routing, direction, token_ring(facts.world, routing=routing, direction=direction))
    if facts.heads > 1:
        yield "hop, both ways", both_ways(token_ring(facts.world))


def _accumulating_ring(facts: Facts) -> Variants:
    for direction in facts.directions:
        yield from _cut("q", facts, "hop", direction, accumulating_ring(facts.world, direction=direction))


def _mesh(facts: Facts) -> Variants:
    """The squarest grid, those that move least in either pass, and one with nodes as rows."""
    world, q, kv = facts.world, facts.heads, facts.kv_heads
    grids = {max(factors(world, upto=isqrt(world))), facts.node_size}
    # Vectors that move for each row of a visitor: q and out, k and v; then q, dout and dq, k, v, dk and dv.
    for of_q, of_kv in ((2 * q, 2 * kv), (3 * q, 4 * kv)):
        grids.add(min(factors(world, upto=world), key=lambda a: (a - 1) * of_q + (world // a - 1) * of_kv))
    for a in sorted(grids):
        if world % a == 0:
            yield f"{a} x {world // a}", (mesh(world, a=a),)
            if world > 2:
                yield f"{a} x {world // a}, direct", (mesh(world, a=a, q_routing="direct", kv_routing="direct"),)


def _all_gather(facts: Facts) -> Variants:
    everyone = ring(facts.world, routing="direct", lookahead=max(1, facts.world - 1))
    yield "", (replace(everyone, name="all_gather"),)


def _cut(what: str, facts: Facts, routing: str, direction: int, schedule: Schedule) -> Variants:
    cut, words = take_turns if routing == "direct" else split, routing + ", reversed" * (direction == -1)
    for parts in facts.parts:
        yield _words(words, parts, 1), (schedule if parts == 1 else cut(schedule, **{what: parts}),)


NAMES: dict[str, Callable[[Facts], Variants]] = {
    "ring": _ring,
    "bidirectional_ring": _bidirectional_ring,
    "ring_direct": _ring_direct,
    "token_ring": _token_ring,
    "accumulating_ring": _accumulating_ring,
    "mesh": _mesh,
    "all_gather": _all_gather,
}
