"""Searches for a good assignment of tiles to ranks: no solver, no clock, and the same answer on every rank.

Two random walks leave from every initial assignment (`initial`); the better half continues from the best assignments it has
reached, and so on. The number of steps depends on the size of the table alone, and random numbers come from seeded generators.

A step moves tiles of one line: a single tile, one against another, all that a rank has to another rank or against all of that
rank's, or all that a rank has to wherever each fits best, which ends a visit. Work beyond the cap is not forbidden but has a
price, which rises while there is any and falls while there is none: so the walk keeps crossing the border near which the good
assignments lie, and does not get stuck on either side of it. A step may also make the objective a little worse.

The total is a plain sum. The busiest port or link is a poor guide, since most steps do not change it; so the search follows the
sum of fourth powers, which falls whenever a busy one is relieved, and remembers the best assignment by the busiest itself.

Integers are added; floats are only added, multiplied and compared, and thresholds come from a table of integers, because
logarithms may differ in their last bit between machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import log
from random import Random
from typing import NamedTuple, TypeAlias

from ringattn.planner.solver.problem import Assignment, Problem, Resource, loads, visits
from ringattn.schedule.ir import Kind
from ringattn.schedule.mesh import factors

Rule = Callable[[int, int], int]  # from the owners of queries and keys to the rank that computes


def initial(problem: Problem) -> list[tuple[int, ...]]:
    """The initial assignments, each once: the rank of every tile.

    Every known algorithm, and some that are none yet:

        ring         at the owner of the queries
        token ring   at the owner of the keys
        grid         at the rank in the row of one owner and the column of the other, for every grid and both orders
        halves       at the owner with the larger rank, or the smaller: of a causal zigzag pair, only halves then travel

    What a mask leaves out never travels, so each is as good as its schedule after `split` and `prune`. Some are not balanced;
    the search corrects that.
    """
    owners = [(problem.q_owner[i], problem.kv_owner[j]) for i, j in problem.tiles]
    assignments = [tuple(rule(q, kv) for q, kv in owners) for rule in _rules(problem.world)]
    return list(dict.fromkeys(assignments))


def _rules(world: int) -> Iterator[Rule]:
    for columns in factors(world, upto=world):  # one column is the ring, `world` columns are TokenRing
        yield partial(_row_of_queries, columns)
        yield partial(_row_of_keys, columns)
    yield max
    yield min


def _row_of_queries(columns: int, q: int, kv: int) -> int:
    return q // columns * columns + kv % columns


def _row_of_keys(columns: int, q: int, kv: int) -> int:
    return kv // columns * columns + q % columns


Toggle: TypeAlias = tuple[int, int, int]  # line, rank, and 1 for a visit that begins or -1 for one that is no longer needed


class Objective:
    """Bytes on every resource of the objective, for one assignment at a time."""

    def __init__(self, problem: Problem, ranks: Sequence[int]) -> None:
        number: dict[Resource, int] = {}
        self._charges = [
            [
                tuple((number.setdefault(resource, len(number)), nbytes) for resource, nbytes in problem.charges(line, rank))
                for rank in range(problem.world)
            ]
            for line in problem.lines
        ]
        self._visit = [line.bytes_in + line.bytes_back for line in problem.lines]
        self._used = [0] * max(1, len(number))
        self.apply((line, rank, 1) for line, rank in visits(problem, ranks))
        self._scale = 1 / max(1, *self._used) if len(number) > 1 else 0.0  # 0: a single resource, whose bytes are the objective

    def value(self) -> tuple[int, int]:
        """Bytes on the busiest resource, then on all: by this assignments are compared."""
        return max(self._used), sum(self._used)

    def apply(self, toggles: Iterable[Toggle]) -> None:
        used = self._used
        for line, rank, sign in toggles:
            for resource, nbytes in self._charges[line][rank]:
                used[resource] += sign * nbytes

    def change(self, toggles: Sequence[Toggle]) -> float:
        """How much worse `toggles` would make the objective, in bytes of the busiest resource."""
        if not self._scale:
            return sum(sign * self._visit[line] for line, _, sign in toggles)
        more: dict[int, int] = {}
        for line, rank, sign in toggles:
            for resource, nbytes in self._charges[line][rank]:
                more[resource] = more.get(resource, 0) + sign * nbytes
        change = 0.0
        for resource, nbytes in more.items():
            before = self._used[resource] * self._scale
            after = before + nbytes * self._scale
            x, y = before * before, after * after
            change += y * y - x * x
        return change / (4 * self._scale)


WARMTH = 0.1  # by how much a step may increase the objective on average, in visits
REVIEW = 20  # steps after which the price of overwork changes
DEARER, CHEAPER = 1.05, 0.95
SPAN = 20.0  # the price of overwork stays within this factor of one visit for a tile

# -log of evenly spaced probabilities in units of 1/1024, rounded: exponential thresholds are drawn from these.
THRESHOLDS = tuple(round(-1024 * log((n + 0.5) / 1024)) for n in range(1024))

Shift: TypeAlias = tuple[Sequence[int], int, int]  # tiles, from rank, to rank


class Solution(NamedTuple):
    badness: tuple[int, int, int]  # work beyond the cap, bytes on the busiest resource, bytes on all
    ranks: tuple[int, ...]


class LocalSearch:
    """One random walk: the rank of every tile, the work of every rank, all visits, and the best assignment so far."""

    def __init__(self, problem: Problem, ranks: Sequence[int], seed: str = "") -> None:
        self.ranks, self.world, self.cap = list(ranks), problem.world, problem.cap
        self.area, self.sides, self.lines = problem.area, problem.sides, problem.lines
        self.members = [line.tiles for line in problem.lines]
        rows, columns = ([sides[n] for sides in problem.sides] for n in (0, 1))
        self.across = [
            columns if line.kind is Kind.Q else rows for line in problem.lines
        ]  # for each line, the other line of every tile
        self.visit = [line.bytes_in + line.bytes_back for line in problem.lines]
        self.objective = Objective(problem, ranks)
        self.load = loads(problem, ranks)
        self.over = sum(max(0, load - self.cap) for load in self.load)
        # Tiles of each line at each rank; the owner counts one more, since it always has its own block.
        self.count = [[int(rank == line.owner) for rank in range(problem.world)] for line in problem.lines]
        for rank, sides in zip(ranks, problem.sides, strict=True):
            for line in sides:
                self.count[line][rank] += 1
        self.best = Solution((self.over, *self.objective.value()), tuple(ranks))
        self.rng = Random(seed).random
        self.usual = max(1.0, sum(self.visit) / max(1, len(self.visit)))
        self.fair = self.price = self.usual * len(self.ranks) / max(1, sum(self.area))

    def run(self, steps: int) -> Solution:
        """Takes `steps` steps; returns the best assignment so far."""
        warmth = WARMTH * self.usual / 1024
        for step in range(steps):
            if step % REVIEW == 0:
                price = self.price * (DEARER if self.over else CHEAPER)
                self.price = min(max(price, self.fair / SPAN), self.fair * SPAN)
            line, shifts = self._propose()
            if shifts:
                toggles, over = self._evaluate(line, shifts)
                change = self.objective.change(toggles) if toggles else 0.0
                if change + self.price * over <= THRESHOLDS[int(self.rng() * 1024)] * warmth:
                    self._apply(shifts, toggles, over)
        return self.best

    def _propose(self) -> tuple[int, Sequence[Shift]]:
        """Draws a line, and tiles of it that change ranks; none if the draw changes nothing."""
        rng, ranks = self.rng, self.ranks
        tile = int(rng() * len(ranks))
        source = ranks[tile]
        line, crossing = self.sides[tile]
        if rng() < 0.5:
            line, crossing = crossing, line
        members, draw, target_draw = self.members[line], rng(), rng()
        if draw < 0.15:
            return line, self._scatter(line, source) if source != self.lines[line].owner else ()
        if target_draw < 0.4:
            target = ranks[members[int(rng() * len(members))]]
        elif target_draw < 0.8:
            others = self.members[crossing]
            target = ranks[others[int(rng() * len(others))]]
        else:
            target = self.lines[line].owner if target_draw < 0.9 else int(rng() * self.world)
        if source == target:
            return line, ()
        if draw < 0.5:
            return line, (((tile,), source, target),)
        back = [other for other in members if ranks[other] == target] if draw < 0.85 else []
        if draw < 0.7:
            return line, (((tile,), source, target), (back and (back[int(rng() * len(back))],), target, source))
        return line, (([other for other in members if ranks[other] == source], source, target), (back, target, source))

    def _scatter(self, line: int, source: int) -> list[Shift]:
        """Moves every tile of `line` at `source` to the rank where it costs least, among equals to the one with least work."""
        shifts: list[Shift] = []
        load, ranks, count, across = self.load, self.ranks, self.count[line], self.across[line]
        elsewhere = {ranks[tile] for tile in self.members[line]} | {self.lines[line].owner}
        for tile in self.members[line]:
            if ranks[tile] == source:
                crossing, area = across[tile], self.area[tile]
                crossing_count, visit, extra, limit = (
                    self.count[crossing],
                    self.visit[line],
                    self.visit[crossing],
                    self.cap - area,
                )
                targets: list[tuple[float, int, int]] = []
                for target in elsewhere.union(
                    [ranks[other] for other in self.members[crossing]], (self.lines[crossing].owner,)
                ):
                    if target != source:
                        over = load[target] - limit
                        cost = (0 if count[target] else visit) + (0 if crossing_count[target] else extra)
                        targets.append((cost + self.price * min(over, area) if over > 0 else cost, load[target], target))
                shifts.append(((tile,), source, min(targets)[2]))
        return shifts

    def _evaluate(self, line: int, shifts: Sequence[Shift]) -> tuple[list[Toggle], int]:
        """The visits that a step begins and ends, and the change of the work beyond the cap."""
        toggles: list[Toggle] = []
        gain: dict[int, int] = {}
        work: dict[int, int] = {}
        counts, areas, across = self.count, self.area, self.across[line]
        for tiles, source, target in shifts:
            area = 0
            for tile in tiles:
                crossing = across[tile]
                count = counts[crossing]
                if count[source] == 1:
                    toggles.append((crossing, source, -1))
                if not count[target]:
                    toggles.append((crossing, target, 1))
                area += areas[tile]
            gain[source], gain[target] = gain.get(source, 0) - len(tiles), gain.get(target, 0) + len(tiles)
            work[source], work[target] = work.get(source, 0) - area, work.get(target, 0) + area
        count, over = counts[line], 0
        for rank, more in gain.items():
            if more:
                if not count[rank]:
                    toggles.append((line, rank, 1))
                elif not count[rank] + more:
                    toggles.append((line, rank, -1))
            before = self.load[rank] - self.cap
            after = before + work[rank]
            if before > 0:
                over -= before
            if after > 0:
                over += after
        return toggles, over

    def _apply(self, shifts: Sequence[Shift], toggles: Sequence[Toggle], over: int) -> None:
        self.objective.apply(toggles)
        self.over += over
        for tiles, source, target in shifts:
            for tile in tiles:
                self.ranks[tile] = target
                self.load[source] -= self.area[tile]
                self.load[target] += self.area[tile]
                for line in self.sides[tile]:
                    self.count[line][source] -= 1
                    self.count[line][target] += 1
        if self.over <= self.best.badness[0]:
            badness = (self.over, *self.objective.value())
            if badness < self.best.badness:
                self.best = Solution(badness, tuple(self.ranks))


STEPS_PER_TILE, LEAST_STEPS, MOST_STEPS = 900, 50_000, 400_000
ROUNDS = 4


def search(problem: Problem) -> Assignment:
    """A balanced assignment that moves few bytes. Equal problems get equal answers."""
    if problem.world == 1 or not problem.tiles:
        return dict.fromkeys(problem.tiles, 0)
    best = LocalSearch(problem, problem.fallback).best
    steps = min(max(LEAST_STEPS, STEPS_PER_TILE * len(problem.tiles)), MOST_STEPS) // ROUNDS
    pool = [problem.fallback, *initial(problem)] * 2
    for turn in range(ROUNDS):
        solutions = [LocalSearch(problem, ranks, f"{turn} {n}").run(steps // len(pool)) for n, ranks in enumerate(pool)]
        solutions.sort(key=lambda solution: solution.badness)
        best = min(best, solutions[0], key=lambda solution: solution.badness)
        pool = [solution.ranks for solution in solutions[: max(1, len(solutions) // 2)]]
    return dict(zip(problem.tiles, best.ranks, strict=True))
