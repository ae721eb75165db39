"""How one kind of thing travels over all ranks: the vocabulary that schedules are written in.

`visit` is at the rank `step * direction` away from its owner during step `step`. It gets there by one of two routings:
    hop      from neighbour to neighbour, one link busy at a time, as published for ring attention and TokenRing
    direct   from the owner straight to each rank in turn, up to `lookahead` of them in flight, so that on a full mesh as
             many links are busy at once

Accumulators come home by `straight_home` (each partial by itself, from wherever it was computed) or by `ride_home` (one
accumulator goes round behind its block and gathers what it finds).
"""

from __future__ import annotations

from collections.abc import Iterator

from ringattn._validation import count, one_of, shown
from ringattn.errors import PlanError
from ringattn.schedule.ir import MOST_RANKS, Kind, Move

ROUTINGS = ("hop", "direct")


def validate(world: int, routing: str, direction: int, lookahead: int) -> tuple[int, int]:
    """`world` and `lookahead`, if all of them are what they should be."""
    world = count("world", world, PlanError, most=MOST_RANKS, cure="a schedule needs at least one rank")
    one_of("routing", routing, ROUTINGS, PlanError)
    if not isinstance(direction, int) or direction not in (1, -1):
        raise PlanError(f"direction={shown(direction)}; 1 turns towards higher ranks, -1 towards lower ones")
    cure = "more keeps more links busy and more buffers full"
    return world, count("lookahead", lookahead, PlanError, cure=cure, most=MOST_RANKS)


def variant(name: str, routing: str, direction: int) -> str:
    """The name with what sets it apart, for plans and pictures."""
    return name + ("_direct" if routing == "direct" else "") + ("_reversed" if direction == -1 else "")


def at(owner: int, step: int, direction: int, world: int) -> int:
    """Where the visitor of `owner` is during `step`."""
    return (owner + step * direction) % world


def visit(kind: Kind, world: int, routing: str, direction: int, lookahead: int) -> Iterator[Move]:
    """Every block of a read-only kind visits every rank, one rank a step."""
    for step in range(1, world):
        for n in range(world):
            src = n if routing == "direct" else at(n, step - 1, direction, world)
            depart = max(0, step - lookahead) if routing == "direct" else step - 1
            yield Move(kind, n, src, at(n, step, direction, world), depart, step)


def straight_home(kind: Kind, world: int, direction: int, lookahead: int) -> Iterator[Move]:
    """What was computed during a visit goes from there to the owner, and is taken in up to `lookahead` steps later."""
    for step in range(1, world):
        for n in range(world):
            due = min(step + 1 + lookahead, world + 1)
            yield Move(kind, n, at(n, step, direction, world), n, step + 1, due)


def ride_home(kind: Kind, world: int, direction: int) -> Iterator[Move]:
    """One accumulator follows its block a step behind; the owner's own share waits at home, so world - 1 hops suffice."""
    for step in range(1, world):
        for n in range(world):
            yield Move(kind, n, at(n, step, direction, world), at(n, step + 1, direction, world), step + 1, step + 2)
