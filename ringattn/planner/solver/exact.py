"""Finds the best assignment of tiles to ranks with a solver: the yardstick for `search`, for up to about 8 ranks.

A mixed-integer program. Every tile is at one rank; a rank that computes a tile of a foreign block is visited by that block; no
rank works beyond the cap; the objective is the bytes of all visits, or a bound on every port or link. Among assignments with
equal bytes on the busiest one, the fewest total bytes win. It may stop at a time limit with less than the best, and then differ
from run to run, so ranks must not run it separately: pass its assignment to `schedule_of`, and the schedule to all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from ringattn.errors import PlanError
from ringattn.planner.solver.problem import Assignment, Problem, Resource

LIGHT = 1e-3  # weight of all bytes against those of the busiest resource, divided by the ranks


class Exact(NamedTuple):
    """`gap` bounds how far the best may be below the value reached, as a fraction of it: 0 is proven optimal."""

    assignment: Assignment
    gap: float


def exact(problem: Problem, *, time_limit: float = 60.0) -> Exact:
    """The assignment with the least objective, or the best reached within `time_limit` seconds. Needs SciPy.

    Raises:
        PlanError: SciPy is not installed, or no assignment was reached in time.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError as error:
        raise PlanError("exact balanced schedules need SciPy: pip install ringattn[plan]") from error
    if not problem.tiles:
        return Exact({}, 0.0)
    program = _Program(problem)
    row, column, value = zip(*program.entries, strict=True)
    matrix = coo_array((value, (row, column)), shape=(len(program.upper), len(program.weight))).tocsr()
    result: Any = milp(
        program.weight,
        constraints=LinearConstraint(matrix, program.lower, program.upper),
        bounds=Bounds(0, program.most),
        integrality=program.integer,
        options={"time_limit": time_limit},
    )
    if result.x is None:
        raise PlanError(f"no assignment within {time_limit} s ({result.message}): allow more time, or use `search`")
    at = np.reshape(result.x[: len(problem.tiles) * problem.world], (-1, problem.world)).argmax(axis=1)
    return Exact({tile: int(rank) for tile, rank in zip(problem.tiles, at, strict=True)}, float(result.mip_gap))


class _Program:
    """Columns: every tile at every rank, then every visit, then the bytes of the busiest resource. Rows: the constraints."""

    def __init__(self, problem: Problem) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.weight: list[float] = []
        self.most: list[float] = []
        self.integer: list[int] = []
        all_ranks, unit = range(problem.world), 1 / max(1, *(line.bytes_in + line.bytes_back for line in problem.lines))
        at = [[self._column(integer=1) for _ in all_ranks] for _ in problem.tiles]
        through: dict[Resource, list[tuple[int, float]]] = defaultdict(list)
        light = 1.0 if problem.objective == "total" else LIGHT / problem.world
        for line in problem.lines:
            for rank in all_ranks:
                if rank != line.owner and line.tiles:
                    visit = self._column(weight=light * unit * (line.bytes_in + line.bytes_back))
                    for resource, nbytes in problem.charges(line, rank):
                        through[resource].append((visit, unit * nbytes))
                    for tile in line.tiles:
                        self._row([(at[tile][rank], 1.0), (visit, -1.0)], -1.0, 0.0)
        for ranks in at:
            self._row([(column, 1.0) for column in ranks], 1.0, 1.0)
        for rank in all_ranks:
            work = [(ranks[rank], area / problem.cap) for ranks, area in zip(at, problem.area, strict=True)]
            self._row(work, 0.0, 1.0)
        if problem.objective != "total":
            busiest = self._column(weight=1.0, most=float("inf"))
            for visits in through.values():
                self._row([*visits, (busiest, -1.0)], -float("inf"), 0.0)

    def _column(self, *, weight: float = 0.0, most: float = 1.0, integer: int = 0) -> int:
        self.weight.append(weight)
        self.most.append(most)
        self.integer.append(integer)
        return len(self.weight) - 1

    def _row(self, entries: list[tuple[int, float]], lower: float, upper: float) -> None:
        self.entries += [(len(self.upper), column, value) for column, value in entries]
        self.lower.append(lower)
        self.upper.append(upper)
