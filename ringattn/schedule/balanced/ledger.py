"""What the search keeps count of: the bytes of all open visits, as one number to make small.

The total is a plain sum. The busiest port or link is a poor guide, since most steps leave it as it is; so the search follows
the sum of fourth powers, which falls whenever a busy one is relieved, and only remembers by the busiest itself.
Integers, and floats that are only added and multiplied: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ringattn.schedule.balanced.problem import Problem, Resource, visits


class Toggle(NamedTuple):
    """A visit that begins (sign 1) or is no longer needed (-1)."""

    line: int
    rank: int
    sign: int


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
        self._used = [0] * max(1, len(number))
        for line, rank in visits(problem, ranks):
            for resource, nbytes in self._charges[line][rank]:
                self._used[resource] += nbytes
        top = max(self._used)
        self._unit = 1 / top if len(number) > 1 and top else 0.0  # 0: a single resource, whose bytes are the measure

    def value(self) -> tuple[int, int]:
        """Bytes on the busiest resource, then on all: what decides."""
        return max(self._used), sum(self._used)

    def change(self, toggles: Iterable[tuple[int, int, int]]) -> float:
        """Enter `toggles`, and say how much worse that is: in bytes, near the top of the busiest."""
        change = 0.0
        unit, used = self._unit, self._used
        for line, rank, sign in toggles:
            for resource, nbytes in self._charges[line][rank]:
                before = used[resource]
                used[resource] = after = before + sign * nbytes
                if unit:
                    x, y = before * unit, after * unit
                    change += (y * y * y * y - x * x * x * x) / (4 * unit)
                else:
                    change += after - before
        return change

    def undo(self, toggles: Iterable[tuple[int, int, int]]) -> None:
        for line, rank, sign in toggles:
            for resource, nbytes in self._charges[line][rank]:
                self._used[resource] -= sign * nbytes
