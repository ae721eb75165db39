"""Balanced: a schedule that an optimiser makes, for any mask and any layout.

Every published schedule fixes which tiles a rank computes by a rule that knows no mask. Here the mask's own table of tiles is
shared out: all ranks work alike, and of what then is possible the least is moved. Under a causal mask with as many KV heads as
heads that is near half of the usual zigzag ring; with few KV heads it turns into that ring by itself, without its idle halves.

    problem    the tables and prices, and what an assignment of tiles to ranks comes to
    search     a good assignment, fast and the same on every rank:   starts, ledger, walk
    exact      the best one, by a solver: the yardstick for `search`
    steps      an assignment as a `Schedule`:                        timeline, batches

Sending queries where keys are many and keys where queries are, tile by tile, is MagiAttention's idea too:
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
    """A schedule for `problem`, the same on every rank. To run one that the solver made, hand `exact`'s to `schedule_of`."""
    return schedule_of(problem, search(problem), lookahead=lookahead)
