"""Builds TokenRing: K and V stay where they are, Q moves one way, and partial results return the other way.

    step 0     step 1     step 2     step 3     step 4     (row: rank, entry: the Q block it works on)
    0          3          2          1                     hop:    Q moves on to the next rank each step
    1          0          3          2                     direct: the owner sends Q straight to each rank
    2          1          0          3
    3          2          1          0
                          <- partials of step 1, then 2, then 3: each straight to the owner of its Q

Both directions of a full-duplex link carry data at once, and nothing of KV ever moves: no keys, values or per-key biases.
Wang et al. 2024, https://arxiv.org/abs/2412.20501, published for the forward pass with hops. New here: the backward pass, from
the same list (q, dout and row statistics move out, dq returns, dk and dv accumulate where they are), and `routing="direct"`,
which sends to several peers at once and so uses every link of a full mesh; buffers stay bounded by `lookahead`.

`accumulating_ring` is the older form, in which one result follows its queries and accumulates on the way: it sends to
neighbours only, but in one direction only, and a result that is added to on its way must travel in the accumulation dtype
(see `wire_fields`).
"""

from __future__ import annotations

from ringattn.schedule.ir import BufferLimits, Kind, Schedule, Tile, make
from ringattn.schedule.moves import accumulate_along, at, return_to_owner, validate, variant, visit


def token_ring(world: int, *, routing: str = "hop", direction: int = 1, lookahead: int | None = None) -> Schedule:
    """Q visits every rank, and each partial result returns straight to the owner.

    Args:
        world: number of ranks.
        routing: "hop" (from neighbour to neighbour) or "direct" (from the owner to each rank).
        direction: 1 towards higher ranks, -1 towards lower ones.
        lookahead: steps that a move may be in flight; by default 1 for hops, and up to 4 for direct.

    Raises:
        PlanError: an argument is out of range.
    """
    world, ahead = validate(world, routing, direction, 1 if lookahead is None else lookahead)
    lookahead = ahead if lookahead is not None else 1 if routing == "hop" else max(1, min(4, world - 1))
    moves = [
        *visit(Kind.Q, world, routing, direction, lookahead),
        *return_to_owner(Kind.Q_ACC, world, direction, lookahead),
    ]
    limits = BufferLimits(q=2 if routing == "hop" else lookahead + 1, q_acc=2 * lookahead + 1)
    return make(variant("token_ring", routing, direction), world, _visits(world, direction), moves, limits)


def accumulating_ring(world: int, *, direction: int = 1) -> Schedule:
    """Q visits every rank, and its result follows one step behind; the last hop returns it to the owner."""
    world, _ = validate(world, "hop", direction, 1)
    moves = [*visit(Kind.Q, world, "hop", direction, 1), *accumulate_along(Kind.Q_ACC, world, direction)]
    return make(
        variant("accumulating_ring", "hop", direction), world, _visits(world, direction), moves, BufferLimits(q=2, q_acc=3)
    )


def _visits(world: int, direction: int) -> list[Tile]:
    """Each query block against the keys of every rank it visits."""
    return [
        Tile(step, at(i, step, direction, world), i, at(i, step, direction, world))
        for step in range(world)
        for i in range(world)
    ]
