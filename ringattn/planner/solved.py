"""Builds balanced schedules as candidates: passes the tiles that a request's mask leaves to `planner.solver`, with prices.

Blocks are halves of shards, as under zigzag. Two objectives are tried, since neither is always best: the total bytes, and the
bytes on the resource that the topology makes scarce. The schedule for one pass may be used for the other; price decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from ringattn.plan.head_groups import make_head_groups
from ringattn.planner.cost import ITEMSIZE
from ringattn.planner.request import Request
from ringattn.planner.solver import Costs, Problem, balanced
from ringattn.schedule import Schedule, ring, split, ulysses
from ringattn.schedule.catalog import Named
from ringattn.sequence.layout import Layout

PARTS = 2  # blocks of each rank
SCARCE = {"mesh": "link", "matrix": "link"}  # on other topologies the port of a rank


def balanced_candidates(request: Request, layout: Layout, degree: int) -> Iterator[Named]:
    """Balanced schedules among the world / degree groups of Ulysses; a single group has nothing to balance."""
    for backward in request.passes:
        for objective in ("total", SCARCE.get(request.topology.kind, "port")):
            inner = _schedule(request, layout, degree, backward, objective)
            words = [f"ulysses {degree}"] * (degree > 1) + [f"least {objective}", "backward's" if backward else "forward's"]
            yield Named("balanced", ", ".join(words), ulysses(inner, degree, stages=degree - 1))


@lru_cache(maxsize=64)
def _schedule(request: Request, layout: Layout, degree: int, backward: bool, objective: str) -> Schedule:
    inner = split(ring(request.world // degree), q=PARTS, kv=PARTS)
    head_groups = ulysses(inner, degree, stages=degree - 1)
    head_group = make_head_groups(head_groups[:1], layout, request.mask, request.heads, request.kv_heads)[0]
    areas: Counter[tuple[int, int]] = Counter()
    for (i, j), area in head_group.areas.items():
        areas[i // degree, j // degree] += area
    rows_q, rows_kv = (
        [sum(block.rows for block in blocks[n : n + degree]) for n in range(0, len(blocks), degree)]
        for blocks in (head_group.q_blocks, head_group.kv_blocks)
    )
    of_q, of_kv = (heads * request.head_dim * ITEMSIZE[request.dtype] for heads in (request.heads, 2 * request.kv_heads))
    costs = Costs(2 * of_q, of_q, of_kv, of_kv) if backward else Costs(of_q, of_q, of_kv)
    return balanced(Problem(inner.world, dict(areas), inner.q_owner, inner.kv_owner, rows_q, rows_kv, costs, objective))
