"""Where the search begins: every known algorithm, and some that are none yet, as an assignment of tiles to ranks.

    ring         at the owner of the queries
    token ring   at the owner of the keys
    grid         at the rank in the row of one owner and the column of the other, for every grid and either way round
    halves       at the owner with the larger rank, or the smaller: of a causal zigzag pair, only halves then travel

What a mask leaves out never travels, so each is as good as its schedule after `split` and `prune`. Some are not balanced; the
search mends that.

What the search keeps count of: the bytes of all open visits, as one number to make small.

The total is a plain sum. The busiest port or link is a poor guide, since most steps leave it as it is; so the search follows
the sum of fourth powers, which falls whenever a busy one is relieved, and only remembers by the busiest itself.
Integers, and floats that are only added and multiplied: the same on every machine.

A random walk over assignments that mostly goes downhill.

A step moves tiles of one line: one of them, one against another, all that a rank has to one other rank or against all of that
one's, or all that a rank has to wherever each fits best, which ends a visit. Work beyond the cap is not forbidden but has a
price, which rises while there is any and falls while there is none: so the walk keeps crossing the border near which the good
assignments lie, and does not get stuck on either side of it. Besides that a step may be a little worse than nothing.

Floats are only added, multiplied and compared, and thresholds come from a table of integers, because logarithms may differ in
their last bit between machines.

A fast search for a good assignment: no solver, no clock, and the same answer on every rank.

Two random walks (see `local_search`) leave from every start (see `initial`); the better half goes on from the best it has seen,
and so forth. The number of steps follows from the size of the table alone, and chance comes from seeded generators.
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
    """Each start once: the rank of every tile."""
    owners = [(problem.q_owner[i], problem.kv_owner[j]) for i, j in problem.tiles]
    options = [tuple(rule(q, kv) for q, kv in owners) for rule in _rules(problem.world)]
    return list(dict.fromkeys(options))


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
        self._scale = 1 / max(1, *self._used) if len(number) > 1 else 0.0  # 0: a single resource, whose bytes are what counts

    def value(self) -> tuple[int, int]:
        """Bytes on the busiest resource, then on all: what decides."""
        return max(self._used), sum(self._used)

    def apply(self, toggles: Iterable[Toggle]) -> None:
        used = self._used
        for line, rank, sign in toggles:
            for resource, nbytes in self._charges[line][rank]:
                used[resource] += sign * nbytes

    def change(self, toggles: Sequence[Toggle]) -> float:
        """How much worse `toggles` would be: in bytes, near the top of the busiest resource."""
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


WARMTH = 0.1  # how much worse than nothing a step may be on average, in visits
REVIEW = 20  # steps after which the price of overwork changes
DEARER, CHEAPER = 1.05, 0.95
SPAN = 20.0  # the price stays within this factor of a visit for a tile

# -log of evenly spread chances in units of 1/1024, rounded: what an exponential threshold is drawn from.
THRESHOLDS = tuple(round(-1024 * log((n + 0.5) / 1024)) for n in range(1024))

Shift: TypeAlias = tuple[Sequence[int], int, int]  # tiles, from rank, to rank


class Solution(NamedTuple):
    badness: tuple[int, int, int]  # work beyond the cap, bytes on the busiest resource, bytes on all
    ranks: tuple[int, ...]


class LocalSearch:
    """Where the walk is: the rank of every tile, the work of every rank, who visits whom, and the best seen so far."""

    def __init__(self, problem: Problem, ranks: Sequence[int], seed: str = "") -> None:
        self.ranks, self.world, self.cap = list(ranks), problem.world, problem.cap
        self.area, self.sides, self.lines = problem.area, problem.sides, problem.lines
        self.members = [line.tiles for line in problem.lines]
        rows, columns = ([sides[n] for sides in problem.sides] for n in (0, 1))
        self.across = [columns if line.kind is Kind.Q else rows for line in problem.lines]  # of every tile of each line
        self.visit = [line.bytes_in + line.bytes_back for line in problem.lines]
        self.objective = Objective(problem, ranks)
        self.load = loads(problem, ranks)
        self.over = sum(max(0, load - self.cap) for load in self.load)
        # Tiles of each line at each rank; the owner counts one more, since its own block is always there.
        self.count = [[int(rank == line.owner) for rank in range(problem.world)] for line in problem.lines]
        for rank, sides in zip(ranks, problem.sides, strict=True):
            for line in sides:
                self.count[line][rank] += 1
        self.best = Solution((self.over, *self.objective.value()), tuple(ranks))
        self.rng = Random(seed).random
        self.usual = max(1.0, sum(self.visit) / max(1, len(self.visit)))
        self.fair = self.price = self.usual * len(self.ranks) / max(1, sum(self.area))

    def run(self, steps: int) -> Solution:
        """Take `steps` steps; the best place seen so far."""
        warmth = WARMTH * self.usual / 1024
        for step in range(steps):
            if step % REVIEW == 0:
                wanted = self.price * (DEARER if self.over else CHEAPER)
                self.price = min(max(wanted, self.fair / SPAN), self.fair * SPAN)
            line, shifts = self._propose()
            if shifts:
                toggles, over = self._evaluate(line, shifts)
                change = self.objective.change(toggles) if toggles else 0.0
                if change + self.price * over <= THRESHOLDS[int(self.rng() * 1024)] * warmth:
                    self._apply(shifts, toggles, over)
        return self.best

    def _propose(self) -> tuple[int, Sequence[Shift]]:
        """A line, and tiles of it that change ranks; none if the draw came to nothing."""
        rng, ranks = self.rng, self.ranks
        tile = int(rng() * len(ranks))
        here = ranks[tile]
        line, crossing = self.sides[tile]
        if rng() < 0.5:
            line, crossing = crossing, line
        mine, how, where = self.members[line], rng(), rng()
        if how < 0.15:
            return line, self._scatter(line, here) if here != self.lines[line].owner else ()
        if where < 0.4:
            there = ranks[mine[int(rng() * len(mine))]]
        elif where < 0.8:
            others = self.members[crossing]
            there = ranks[others[int(rng() * len(others))]]
        else:
            there = self.lines[line].owner if where < 0.9 else int(rng() * self.world)
        if here == there:
            return line, ()
        if how < 0.5:
            return line, (((tile,), here, there),)
        back = [other for other in mine if ranks[other] == there] if how < 0.85 else []
        if how < 0.7:
            return line, (((tile,), here, there), (back and (back[int(rng() * len(back))],), there, here))
        return line, (([other for other in mine if ranks[other] == here], here, there), (back, there, here))

    def _scatter(self, line: int, here: int) -> list[Shift]:
        """Every tile of `line` at `here` goes where it costs least, among equals to the rank with least work."""
        shifts: list[Shift] = []
        load, ranks, count, across = self.load, self.ranks, self.count[line], self.across[line]
        elsewhere = {ranks[tile] for tile in self.members[line]} | {self.lines[line].owner}
        for tile in self.members[line]:
            if ranks[tile] == here:
                crossing, area = across[tile], self.area[tile]
                met, visit, extra, limits = self.count[crossing], self.visit[line], self.visit[crossing], self.cap - area
                options: list[tuple[float, int, int]] = []
                for there in elsewhere.union([ranks[other] for other in self.members[crossing]], (self.lines[crossing].owner,)):
                    if there != here:
                        over = load[there] - limits
                        cost = (0 if count[there] else visit) + (0 if met[there] else extra)
                        options.append((cost + self.price * min(over, area) if over > 0 else cost, load[there], there))
                shifts.append(((tile,), here, min(options)[2]))
        return shifts

    def _evaluate(self, line: int, shifts: Sequence[Shift]) -> tuple[list[Toggle], int]:
        """The visits that a step begins and ends, and how much more work is then beyond the cap."""
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
    """A balanced assignment that moves little. Equal problems get equal answers."""
    if problem.world == 1 or not problem.tiles:
        return dict.fromkeys(problem.tiles, 0)
    best = LocalSearch(problem, problem.fallback).best
    steps = min(max(LEAST_STEPS, STEPS_PER_TILE * len(problem.tiles)), MOST_STEPS) // ROUNDS
    pool = [problem.fallback, *initial(problem)] * 2
    for turn in range(ROUNDS):
        options = [LocalSearch(problem, ranks, f"{turn} {n}").run(steps // len(pool)) for n, ranks in enumerate(pool)]
        options.sort(key=lambda solution: solution.badness)
        best = min(best, options[0], key=lambda solution: solution.badness)
        pool = [solution.ranks for solution in options[: max(1, len(options) // 2)]]
    return dict(zip(problem.tiles, best.ranks, strict=True))
