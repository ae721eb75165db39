"""A fast search for a good assignment: no solver, no clock, and the same answer on every rank.

All starts (see `starts`) are improved for a while by a random walk (see `walk`), the better half goes on, and so forth until
one is left. The number of steps follows from the size of the table alone, and chance comes from a seeded generator.
"""

from __future__ import annotations

from random import Random

from ringattn.schedule.balanced.problem import Assignment, Problem
from ringattn.schedule.balanced.starts import starts
from ringattn.schedule.balanced.walk import Walk

STEPS_PER_TILE, FIRST_STEPS, MOST_STEPS = 750, 5_000, 1_000_000


def search(problem: Problem, *, seed: int = 0) -> Assignment:
    """A balanced assignment that moves little. Equal problems get equal answers."""
    pool = [problem.fallback, *starts(problem)]
    rounds = len(pool).bit_length() if problem.world > 1 and problem.tiles else 0
    best = Walk(problem, problem.fallback).best
    for turn in range(rounds):
        steps = min(MOST_STEPS, FIRST_STEPS + STEPS_PER_TILE * len(problem.tiles)) // (rounds * len(pool))
        found = []
        for n, ranks in enumerate(pool):
            walk = Walk(problem, ranks)
            walk.go(steps, Random(f"{seed} {turn} {n}"))
            found.append(walk.best)
        found.sort(key=lambda one: one.badness)
        best = min(best, found[0], key=lambda one: one.badness)
        pool = [one.ranks for one in found[: max(1, len(found) // 2)]]
    return dict(zip(problem.tiles, best.ranks, strict=True))
