"""Builds ring attention: queries stay, KV moves around the ring, and gradients of KV follow one step behind it.

    step 0       step 1       step 2       step 3        (row: rank, entry: the KV block it works on)
    0            3            2            1
    1            0            3            2
    2            1            0            3
    3            2            1            0

Liu, Zaharia, Abbeel 2023, https://arxiv.org/abs/2310.01889. The accumulator makes world - 1 hops where the usual code makes
world, because the owner's own partial result stays at the owner.

`bidirectional_ring` is two rings in opposite directions, each with half of the heads, so that both directions of every link
carry data. It is the fair baseline for TokenRing: the same time on full-duplex links for MHA, less for GQA.
"""

from __future__ import annotations

from ringattn.schedule.ir import BufferLimits, Kind, Schedule, Tile, make
from ringattn.schedule.moves import accumulate_along, at, return_to_owner, validate, variant, visit


def ring(world: int, *, routing: str = "hop", direction: int = 1, lookahead: int = 1) -> Schedule:
    """KV visits every rank. `routing="direct"` sends it from the owner to each rank, and gradients straight back.

    Args:
        world: number of ranks.
        routing: "hop" (from neighbour to neighbour) or "direct" (from the owner to each rank).
        direction: 1 towards higher ranks, -1 towards lower ones.
        lookahead: number of peers that the owner sends to at once with "direct".

    Raises:
        PlanError: an argument is out of range.
    """
    world, lookahead = validate(world, routing, direction, lookahead)
    tiles = [
        Tile(step, at(j, step, direction, world), at(j, step, direction, world), j)
        for step in range(world)
        for j in range(world)
    ]
    inputs = visit(Kind.KV, world, routing, direction, lookahead)
    if routing == "hop":
        results, limits = accumulate_along(Kind.KV_ACC, world, direction), BufferLimits(kv=2, kv_acc=3)
    else:
        results, limits = (
            return_to_owner(Kind.KV_ACC, world, direction, lookahead),
            BufferLimits(kv=lookahead + 1, kv_acc=2 * lookahead + 1),
        )
    return make(variant("ring", routing, direction), world, tiles, [*inputs, *results], limits)


def bidirectional_ring(world: int, *, routing: str = "hop", lookahead: int = 1) -> tuple[Schedule, Schedule]:
    """Two rings in opposite directions; the plan gives each half of the heads."""
    return tuple(ring(world, routing=routing, direction=d, lookahead=lookahead) for d in (1, -1))  # type: ignore[return-value]
