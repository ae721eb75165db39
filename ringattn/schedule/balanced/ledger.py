"""What the search keeps count of: the bytes of all open visits, as one number to make small.

The total is a plain sum. The busiest port or link is a poor guide, since most steps leave it as it is; so the search follows
the sum of fourth powers, which falls whenever a busy one is relieved, and only remembers by the busiest itself.
Integers, and floats that are only added and multiplied: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from ringattn.schedule.balanced.problem import Problem, Resource, visits

Toggle: TypeAlias = tuple[int, int, int]  # line, rank, and 1 for a visit that begins or -1 for one that is no longer needed


class Ledger:
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
        self._visit = [line.bytes_in + line.bytes_home for line in problem.lines]
        self._used = [0] * max(1, len(number))
        self.enter((line, rank, 1) for line, rank in visits(problem, ranks))
        self._scale = 1 / max(1, *self._used) if len(number) > 1 else 0.0  # 0: a single resource, whose bytes are what counts

    def value(self) -> tuple[int, int]:
        """Bytes on the busiest resource, then on all: what decides."""
        return max(self._used), sum(self._used)

    def enter(self, toggles: Iterable[Toggle]) -> None:
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
