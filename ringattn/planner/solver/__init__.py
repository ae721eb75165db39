"""Builds balanced schedules with an optimiser, for any mask and any layout.

Every published schedule fixes the tiles of a rank by a rule that does not know the mask. Here the tiles that the mask leaves
are assigned to ranks: all ranks get equal work, and among such assignments one that moves few bytes is chosen. Under a causal
mask with as many KV heads as heads it moves about half of the usual zigzag ring; with few KV heads it becomes that ring,
without the halves of blocks that have no work.

    problem        the table of tiles, prices, and what an assignment of tiles to ranks costs
    local_search   a good assignment, fast and the same on every rank
    exact          the best assignment, by a solver: the yardstick for `local_search`
    timeline       an assignment as a `Schedule`

Sending queries where keys are many and keys where queries are, tile by tile, is also MagiAttention's idea:
https://github.com/SandAI-org/MagiAttention. The search, the solver's program and the timeline are new here.
"""

from __future__ import annotations

from ringattn.planner.solver.exact import Exact, exact
from ringattn.planner.solver.local_search import search
from ringattn.planner.solver.problem import OBJECTIVES, Assignment, Costs, Measure, Problem, measure
from ringattn.planner.solver.timeline import schedule_of
from ringattn.schedule.ir import Schedule

__all__ = [
    "Assignment",
    "Costs",
    "Exact",
    "Measure",
    "OBJECTIVES",
    "Problem",
    "balanced",
    "exact",
    "measure",
    "schedule_of",
    "search",
]


def balanced(problem: Problem, *, lookahead: int | None = None) -> Schedule:
    """A schedule for `problem`, the same on every rank. For the solver's one, pass `exact`'s assignment to `schedule_of`."""
    return schedule_of(problem, search(problem), lookahead=lookahead)
