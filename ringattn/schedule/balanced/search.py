"""A fast search for a good assignment: no solver, no clock, and the same answer on every rank.

All starts (see `starts`) are improved for a while by a random walk (see `walk`), the better half goes on, and so forth until
one is left. The number of steps follows from the size of the table alone, and chance comes from seeded generators.
"""

from __future__ import annotations

from ringattn.schedule.balanced.problem import Assignment, Problem
from ringattn.schedule.balanced.starts import starts
from ringattn.schedule.balanced.walk import Walk

STEPS_PER_TILE, MOST_STEPS = 900, 400_000


def search(problem: Problem) -> Assignment:
    """A balanced assignment that moves little. Equal problems get equal answers."""
    best = Walk(problem, problem.fallback).best
    pool = [problem.fallback, *starts(problem)]
    rounds = len(pool).bit_length() if problem.world > 1 and problem.tiles else 0
    steps = min(MOST_STEPS, STEPS_PER_TILE * len(problem.tiles))
    for turn in range(rounds):
        share = steps // (rounds * len(pool))
        found = [Walk(problem, ranks, seed=f"{turn} {n}").go(share) for n, ranks in enumerate(pool)]
        found.sort(key=lambda one: one.badness)
        best = min(best, found[0], key=lambda one: one.badness)
        pool = [one.ranks for one in found[: max(1, len(found) // 2)]]
    return dict(zip(problem.tiles, best.ranks, strict=True))
