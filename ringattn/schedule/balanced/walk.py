"""A random walk over assignments that mostly goes downhill.

A step moves tiles of one line between two ranks: one tile, one against another, all of a line, or all against all. Work beyond
the cap is not forbidden but has a price, which rises while there is any and falls while there is none: so the walk keeps
crossing the border near which the good assignments lie, and does not get stuck on either side of it. Besides that a step may
be a little worse than nothing.

Floats are only added, multiplied and compared, and thresholds come from a table of integers, because logarithms may differ in
their last bit between machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from random import Random
from typing import NamedTuple

from ringattn.schedule.balanced.ledger import Ledger
from ringattn.schedule.balanced.problem import Problem, loads

WARMTH = 0.06  # how much worse than nothing a step may be on average, in visits
REVIEW = 20  # steps after which the price of overwork changes
DEARER, CHEAPER = 1.05, 0.95
SPAN = 50.0  # the price stays within this factor of a visit for a tile

# -log of evenly spread chances in units of 1/1024, rounded: what an exponential threshold is drawn from.
THRESHOLDS = tuple(round(-1024 * log((n + 0.5) / 1024)) for n in range(1024))


class Found(NamedTuple):
    badness: tuple[int, int, int]  # work beyond the cap, bytes on the busiest resource, bytes on all
    ranks: tuple[int, ...]


class Walk:
    """Where the walk is: the rank of every tile, the work of every rank, who visits whom, and the best seen so far."""

    def __init__(self, problem: Problem, ranks: Sequence[int]) -> None:
        self.problem, self.ranks, self.cap = problem, list(ranks), problem.cap
        self.ledger = Ledger(problem, ranks)
        self.load = loads(problem, ranks)
        self.over = sum(max(0, load - self.cap) for load in self.load)
        # Tiles of each line at each rank; the owner counts one more, since its own block is always there.
        self.count = [[int(rank == line.home) for rank in range(problem.world)] for line in problem.lines]
        for rank, sides in zip(ranks, problem.sides, strict=True):
            for line in sides:
                self.count[line][rank] += 1
        self.best = Found((self.over, *self.ledger.value()), tuple(ranks))

    def go(self, steps: int, random: Random) -> None:
        """Take `steps` steps."""
        chance, lines = random.random, self.problem.lines
        visit = max(1.0, sum(line.bytes_in + line.bytes_home for line in lines) / len(lines))
        fair = price = visit * len(self.ranks) / sum(self.problem.area)
        warmth = WARMTH * visit / 1024
        for step in range(steps):
            if step % REVIEW == 0:
                price = min(price * DEARER, fair * SPAN) if self.over else max(price * CHEAPER, fair / SPAN)
            line, here, there, going, coming = self._propose(chance)
            if here == there:
                continue
            toggles, area = self._toggles(line, here, there, going, coming)
            change = self.ledger.change(toggles)
            over = self._overwork(here, there, area)
            if change + price * over <= THRESHOLDS[int(chance() * 1024)] * warmth:
                self._enter(line, here, there, going, coming, area, over)
            else:
                self.ledger.undo(toggles)

    def _propose(self, chance: Callable[[], float]) -> tuple[int, int, int, Sequence[int], Sequence[int]]:
        """A line, two ranks, and the tiles of the line that go from the first to the second and the other way."""
        ranks, lines = self.ranks, self.problem.lines
        tile = int(chance() * len(ranks))
        here = ranks[tile]
        line, crossing = self.problem.sides[tile] if chance() < 0.5 else self.problem.sides[tile][::-1]
        mine = lines[line].tiles
        where = chance()
        if where < 0.4:
            there = ranks[mine[int(chance() * len(mine))]]
        elif where < 0.8:
            others = lines[crossing].tiles
            there = ranks[others[int(chance() * len(others))]]
        else:
            there = lines[line].home if where < 0.9 else int(chance() * self.problem.world)
        how = chance()
        if how < 0.4 or here == there:
            return line, here, there, (tile,), ()
        coming = [other for other in mine if ranks[other] == there] if how < 0.6 or how > 0.8 else []
        if how < 0.6:
            return line, here, there, (tile,), coming and (coming[int(chance() * len(coming))],)
        return line, here, there, [other for other in mine if ranks[other] == here], coming

    def _toggles(
        self, line: int, here: int, there: int, going: Sequence[int], coming: Sequence[int]
    ) -> tuple[list[tuple[int, int, int]], int]:
        """The visits that the step ends and begins, and the work that it moves from `here` to `there`."""
        sides, area, counts = self.problem.sides, self.problem.area, self.count
        toggles, moved = [], 0
        count, net = counts[line], len(going) - len(coming)
        if net:
            for rank, gain in ((here, -net), (there, net)):
                if not count[rank]:
                    toggles.append((line, rank, 1))
                elif not count[rank] + gain:
                    toggles.append((line, rank, -1))
        for tiles, source, target, sign in ((going, here, there, 1), (coming, there, here, -1)):
            for tile in tiles:
                a, b = sides[tile]
                crossing = b if a == line else a
                count = counts[crossing]
                if count[source] == 1:
                    toggles.append((crossing, source, -1))
                if not count[target]:
                    toggles.append((crossing, target, 1))
                moved += sign * area[tile]
        return toggles, moved

    def _overwork(self, here: int, there: int, area: int) -> int:
        """How much more work than before is beyond the cap."""
        cap, less, more = self.cap, self.load[here], self.load[there]
        return max(0, less - area - cap) - max(0, less - cap) + max(0, more + area - cap) - max(0, more - cap)

    def _enter(
        self, line: int, here: int, there: int, going: Sequence[int], coming: Sequence[int], area: int, over: int
    ) -> None:
        """Take the step; its visits are in the ledger already."""
        for tiles, source, target in ((going, here, there), (coming, there, here)):
            for tile in tiles:
                self.ranks[tile] = target
                for side in self.problem.sides[tile]:
                    self.count[side][source] -= 1
                    self.count[side][target] += 1
        self.load[here] -= area
        self.load[there] += area
        self.over += over
        badness = (self.over, *self.ledger.value())
        if badness < self.best.badness:
            self.best = Found(badness, tuple(self.ranks))
