"""Ring attention: queries stay, KV goes round; gradients of KV ride one step behind it and come home.

    step 0       step 1       step 2       step 3        (row: rank, entry: the KV block it works on)
    0            3            2            1
    1            0            3            2
    2            1            0            3
    3            2            1            0

Liu, Zaharia, Abbeel 2023, https://arxiv.org/abs/2310.01889. The accumulator makes world - 1 hops where the usual code makes
world: the owner's own share can wait at home.

`bidirectional_ring` is two of them in opposite directions, each with half of the heads, so that both directions of every link
carry data. It is the honest baseline for TokenRing: same time on full-duplex links for MHA, less for GQA.
"""

from __future__ import annotations

from ringattn.schedule.ir import Kind, Room, Schedule, Tile, make
from ringattn.schedule.moves import at, ride_home, straight_home, validate, variant, visit


def ring(world: int, *, routing: str = "hop", direction: int = 1, lookahead: int = 1) -> Schedule:
    """KV visits every rank. `routing="direct"` sends it from the owner to each rank, gradients straight back."""
    world, lookahead = validate(world, routing, direction, lookahead)
    tiles = [
        Tile(step, at(j, step, direction, world), at(j, step, direction, world), j)
        for step in range(world)
        for j in range(world)
    ]
    inputs = visit(Kind.KV, world, routing, direction, lookahead)
    if routing == "hop":
        results, room = ride_home(Kind.KV_ACC, world, direction), Room(kv=2, kv_acc=3)
    else:
        results, room = (
            straight_home(Kind.KV_ACC, world, direction, lookahead),
            Room(kv=lookahead + 1, kv_acc=2 * lookahead + 1),
        )
    return make(variant("ring", routing, direction), world, tiles, [*inputs, *results], room)


def bidirectional_ring(world: int, *, routing: str = "hop", lookahead: int = 1) -> tuple[Schedule, Schedule]:
    """Two lanes in opposite directions; the plan gives each half of the heads."""
    return tuple(ring(world, routing=routing, direction=d, lookahead=lookahead) for d in (1, -1))  # type: ignore[return-value]
