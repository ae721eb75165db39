"""A fast search for a good assignment: no solver, no clock, and the same answer on every rank.

Two random walks (see `walk`) leave from every start (see `starts`); the better half goes on from the best it has seen, and so
forth. The number of steps follows from the size of the table alone, and chance comes from seeded generators.
"""

from __future__ import annotations

from ringattn.schedule.balanced.problem import Assignment, Problem
from ringattn.schedule.balanced.starts import starts
from ringattn.schedule.balanced.walk import Walk

STEPS_PER_TILE, LEAST_STEPS, MOST_STEPS = 900, 50_000, 400_000
ROUNDS = 4


def search(problem: Problem) -> Assignment:
    """A balanced assignment that moves little. Equal problems get equal answers."""
    if problem.world == 1 or not problem.tiles:
        return dict.fromkeys(problem.tiles, 0)
    best = Walk(problem, problem.fallback).best
    steps = min(max(LEAST_STEPS, STEPS_PER_TILE * len(problem.tiles)), MOST_STEPS) // ROUNDS
    pool = [problem.fallback, *starts(problem)] * 2
    for turn in range(ROUNDS):
        found = [Walk(problem, ranks, f"{turn} {n}").go(steps // len(pool)) for n, ranks in enumerate(pool)]
        found.sort(key=lambda one: one.badness)
        best = min(best, found[0], key=lambda one: one.badness)
        pool = [one.ranks for one in found[: max(1, len(found) // 2)]]
    return dict(zip(problem.tiles, best.ranks, strict=True))
