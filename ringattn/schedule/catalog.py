"""Lists schedules by name, each with the variants among which the planner chooses by price.

    ring                 KV from neighbour to neighbour, in either direction
    bidirectional_ring   half of the heads in each direction
    ring_direct          KV from its owner straight to each rank, a few at a time
    token_ring           Q to neighbours or straight to each rank, partial results straight back; or half of the heads
                         in each direction
    accumulating_ring    Q to neighbours, followed by one result that accumulates
    mesh                 Q along rows, KV along columns, by hop or direct; a few suitable grids
    all_gather           KV from its owner to all ranks at once: one exchange, and buffers as large as the whole sequence

Each of them also inside Ulysses, in which groups of ranks exchange sequence for heads (see `schedule.ulysses`); the name is
then that of the schedule among the groups.

`balanced` is built for a mask and a layout, so it is not here: see `planner.solver` and the planner.

Blocks may be cut into parts that travel separately: halves, of which a mask may leave one unread; quarters, so that the first
tile starts and the first result leaves early; or trimmed to the rows that another rank needs (see `head_groups.trim`).
Within a name and among names, schedules with smaller buffers come first.
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

TRIMMED = 3  # parts: the rows that others need, and those before and after them
IN_FLIGHT = 4  # peers that a direct schedule sends to at once

HeadGroups = tuple[Schedule, ...]


@dataclass(frozen=True)
class Named:
    """One variant of a named schedule."""

    name: str
    variant: str
    head_groups: HeadGroups
    trimmed: bool = False  # cut its blocks where a layout has rows that no other rank needs

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


@dataclass(frozen=True)
class Facts:
    """What the choice of variants depends on. `node_size` is 1 where ranks are not grouped in nodes."""

    world: int
    heads: int
    kv_heads: int
    node_size: int = 1
    directions: tuple[int, ...] = (1, -1)
    parts: tuple[int, ...] = (1,)
    trimmed: tuple[str, ...] = ()  # "q", "kv": of which a layout has rows that no other rank needs

    def inside(self, degree: int) -> Facts:
        """The facts for a schedule that runs inside Ulysses of `degree`."""
        node = self.node_size // degree if self.node_size % degree == 0 else 1
        of_one = max(1, self.heads // degree), max(1, self.kv_heads // degree)
        narrowed = replace(self, directions=self.directions[-1:], parts=self.parts[-1:])  # those that move least in most cases
        return replace(narrowed, world=self.world // degree, heads=of_one[0], kv_heads=of_one[1], node_size=node)


def named(name: str, facts: Facts, degree: int = 1) -> Iterator[Named]:
    """The variants of `name`, one of `NAMES`, inside Ulysses of `degree`."""
    if degree == 1:
        for variant, head_groups, trimmed in _and_trimmed(NAMES[name](facts), facts):
            yield Named(name, variant, head_groups, trimmed)
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
    for variant, head_groups, trimmed in _and_trimmed(NAMES[name](inside), inside):
        for n in groups if facts.kv_heads >= degree * len(head_groups) else [1]:
            wrapped = zip(
                *(ulysses(head_group, degree, stages=degree - 1, groups=n) for head_group in head_groups), strict=True
            )
            interleaved = tuple(head_group for member in wrapped for head_group in member)
            yield Named(name, _words(f"ulysses {degree}, {variant}", 1, n), interleaved, trimmed)


def _and_trimmed(variants: Variants, facts: Facts) -> Iterator[tuple[str, HeadGroups, bool]]:
    """Each variant, and where its blocks are uncut and some rows that travel are not needed, also one without these rows."""
    for variant, head_groups in variants:
        yield variant, head_groups, False
        moving = {"q" if move.kind.of_queries else "kv" for head_group in head_groups for move in head_group.moves} & set(
            facts.trimmed
        )
        if moving and all(
            len(head_group.q_owner) == len(head_group.kv_owner) == head_group.world for head_group in head_groups
        ):
            divided = tuple(divide(head_group, **dict.fromkeys(moving, TRIMMED)) for head_group in head_groups)
            yield ", ".join(filter(None, (variant, "trimmed"))), divided, True


def _words(variant: str, parts: int, groups: int) -> str:
    words = [variant, f"{parts} parts" if parts > 1 else "", f"{groups} groups" if groups > 1 else ""]
    return ", ".join(filter(None, words))


Variants = Iterator[tuple[str, HeadGroups]]


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
    schedule = ring(facts.world, routing="direct", lookahead=max(1, facts.world - 1))
    yield "", (replace(schedule, name="all_gather"),)


def _cut(kind: str, facts: Facts, routing: str, direction: int, schedule: Schedule) -> Variants:
    cut, words = take_turns if routing == "direct" else split, routing + ", reversed" * (direction == -1)
    for parts in facts.parts:
        yield _words(words, parts, 1), (schedule if parts == 1 else cut(schedule, **{kind: parts}),)


NAMES: dict[str, Callable[[Facts], Variants]] = {
    "ring": _ring,
    "bidirectional_ring": _bidirectional_ring,
    "ring_direct": _ring_direct,
    "token_ring": _token_ring,
    "accumulating_ring": _accumulating_ring,
    "mesh": _mesh,
    "all_gather": _all_gather,
}
