"""TokenRing: K and V stay where they are, Q goes out one way, partial results come home the other way.

    step 0     step 1     step 2     step 3     step 4     (row: rank, entry: the Q block it works on)
    0          3          2          1                     hop:    Q moves on to the next rank each step
    1          0          3          2                     direct: the owner sends Q straight to each rank
    2          1          0          3
    3          2          1          0
                          <- partials of step 1, then 2, then 3: each straight to the owner of its Q

Both directions of a full-duplex link carry data at once, and nothing of KV ever moves: not keys, not values, not per-key
biases. Wang et al. 2024, https://arxiv.org/abs/2412.20501, published for the forward pass with hops. New here: the backward
pass, from the same list (q, dout and row statistics go out, dq comes home, dk and dv gather where they are), and
`routing="direct"`, which sends to several peers at once and so uses every link of a full mesh; buffers stay bounded by
`lookahead`.

`accumulating_ring` is the older form, in which one result rides along behind its queries and gathers what it finds: neighbours
only, but one way only, and a result that is added to on its way must travel wide (see `payload`).
"""

from __future__ import annotations

from ringattn.schedule.ir import Kind, Room, Schedule, Tile, make
from ringattn.schedule.moves import at, ride_home, straight_home, validate, variant, visit


def token_ring(world: int, *, routing: str = "hop", direction: int = 1, lookahead: int | None = None) -> Schedule:
    """Q visits every rank, and each partial goes straight home. `lookahead` (steps in flight) is 1 for hops, else up to 4."""
    world, ahead = validate(world, routing, direction, 1 if lookahead is None else lookahead)
    lookahead = ahead if lookahead is not None else 1 if routing == "hop" else max(1, min(4, world - 1))
    moves = [
        *visit(Kind.Q, world, routing, direction, lookahead),
        *straight_home(Kind.Q_ACC, world, direction, lookahead),
    ]
    room = Room(q=2 if routing == "hop" else lookahead + 1, q_acc=2 * lookahead + 1)
    return make(variant("token_ring", routing, direction), world, _visits(world, direction), moves, room)


def accumulating_ring(world: int, *, direction: int = 1) -> Schedule:
    """Q visits every rank, and its result follows a step behind; on the last hop it comes home."""
    world, _ = validate(world, "hop", direction, 1)
    moves = [*visit(Kind.Q, world, "hop", direction, 1), *ride_home(Kind.Q_ACC, world, direction)]
    return make(variant("accumulating_ring", "hop", direction), world, _visits(world, direction), moves, Room(q=2, q_acc=3))


def _visits(world: int, direction: int) -> list[Tile]:
    """At each rank that a Q visits it meets the keys that live there."""
    return [
        Tile(step, at(i, step, direction, world), i, at(i, step, direction, world))
        for step in range(world)
        for i in range(world)
    ]
