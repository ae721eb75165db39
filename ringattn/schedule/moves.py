"""Generates the moves of one kind of item over all ranks; schedules are composed of these.

`visit` is at the rank `step * direction` away from its owner during step `step`. It gets there by one of two routings:
    hop      from neighbour to neighbour, one link busy at a time, as published for ring attention and TokenRing
    direct   from the owner straight to each rank in turn, up to `lookahead` of them in flight, so that on a full mesh as
             many links are busy at once

Accumulators return by `return_to_owner` (each partial result by itself, from the rank that computed it) or by
`accumulate_along` (one accumulator follows its block and is added to at every rank).
"""

from __future__ import annotations

from collections.abc import Iterator

from ringattn._validation import count, one_of, short_repr
from ringattn.errors import PlanError
from ringattn.schedule.ir import MOST_RANKS, Kind, Move

ROUTINGS = ("hop", "direct")


def validate(world: int, routing: str, direction: int, lookahead: int) -> tuple[int, int]:
    """Checks the arguments that schedules share; returns `world` and `lookahead`."""
    world = count("world", world, PlanError, most=MOST_RANKS, hint="a schedule needs at least one rank")
    one_of("routing", routing, ROUTINGS, PlanError)
    if not isinstance(direction, int) or direction not in (1, -1):
        raise PlanError(f"direction={short_repr(direction)}; 1 turns towards higher ranks, -1 towards lower ones")
    hint = "more keeps more links busy and more buffers full"
    return world, count("lookahead", lookahead, PlanError, hint=hint, most=MOST_RANKS)


def variant(name: str, routing: str, direction: int) -> str:
    """The name of a variant of a schedule, for plans and pictures."""
    return name + ("_direct" if routing == "direct" else "") + ("_reversed" if direction == -1 else "")


def at(owner: int, step: int, direction: int, world: int) -> int:
    """The rank that the block of `owner` visits during `step`."""
    return (owner + step * direction) % world


def visit(kind: Kind, world: int, routing: str, direction: int, lookahead: int) -> Iterator[Move]:
    """Every block of a read-only kind visits every rank, one rank a step."""
    for step in range(1, world):
        for n in range(world):
            src = n if routing == "direct" else at(n, step - 1, direction, world)
            depart = max(0, step - lookahead) if routing == "direct" else step - 1
            yield Move(kind, n, src, at(n, step, direction, world), depart, step)


def return_to_owner(kind: Kind, world: int, direction: int, lookahead: int) -> Iterator[Move]:
    """The result of each visit moves from there to the owner, and is received up to `lookahead` steps later."""
    for step in range(1, world):
        for n in range(world):
            arrival = min(step + 1 + lookahead, world + 1)
            yield Move(kind, n, at(n, step, direction, world), n, step + 1, arrival)


def accumulate_along(kind: Kind, world: int, direction: int) -> Iterator[Move]:
    """One accumulator follows its block one step behind; the owner's own share stays there, so world - 1 hops suffice."""
    for step in range(1, world):
        for n in range(world):
            yield Move(kind, n, at(n, step, direction, world), at(n, step + 1, direction, world), step + 1, step + 2)
