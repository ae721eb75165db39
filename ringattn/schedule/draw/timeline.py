"""Collects what a picture of a pass shows: a box for each tile, an arrow for each message.

An arrow is a message that the engine sends: moves that share a message share an arrow. This is plain data, read by every kind
of picture. It proves nothing (`check` does) and knows no bytes or seconds (`cost` does).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ringattn.schedule.ir import Kind, Schedule
from ringattn.schedule.program import Item, messages


class Box(NamedTuple):
    """A tile: query block i, which belongs to rank `owner`, against key block j."""

    head_group: int
    rank: int
    step: int
    i: int
    j: int
    owner: int

    def __str__(self) -> str:
        return f"Q{self.i}·K{self.j}"


class Arrow(NamedTuple):
    """A message. `kinds` are those of its items, each named once."""

    src: int
    dst: int
    depart: int
    arrival: int
    kinds: tuple[Kind, ...]
    label: str


@dataclass(frozen=True)
class Timeline:
    """The boxes and arrows of one pass of several head groups."""

    name: str
    world: int
    head_groups: int
    backward: bool
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]

    @cached_property
    def steps(self) -> int:
        """Number of steps, at least one; in the last one ranks may only receive."""
        return max([box.step for box in self.boxes] + [arrow.arrival for arrow in self.arrows], default=0) + 1

    @cached_property
    def cells(self) -> dict[tuple[int, int, int], list[Box]]:
        """The tiles of each (head group, rank, step) that has any."""
        cells = defaultdict(list)
        for box in self.boxes:
            cells[box.head_group, box.rank, box.step].append(box)
        return dict(cells)

    @property
    def title(self) -> str:
        return f"{self.name or 'no schedule'}, {_count(self.world, 'rank')}, {'backward' if self.backward else 'forward'}"

    @property
    def subtitle(self) -> str:
        return f"{_count(len(self.boxes), 'tile')} and {_count(len(self.arrows), 'message')} in {_count(self.steps, 'step')}"


def timeline(schedules: Sequence[Schedule], *, backward: bool = False) -> Timeline:
    """The tiles and messages of one pass; each schedule is a head group."""
    boxes = [Box(n, t.rank, t.step, t.i, t.j, s.q_owner[t.i]) for n, s in enumerate(schedules) for t in s.tiles]
    arrows = [
        Arrow(m.src, m.dst, m.depart, m.arrival, _kinds(m.items), _label(m.items, len(schedules)))
        for m in messages(schedules, backward=backward)
    ]
    world = max((s.world for s in schedules), default=0)
    return Timeline(" | ".join(s.name for s in schedules), world, len(schedules), backward, tuple(boxes), tuple(arrows))


def _kinds(items: Sequence[Item]) -> tuple[Kind, ...]:
    """The kinds of `items`, inputs first, in any order of head groups."""
    carried = {item.kind for item in items}
    return tuple(kind for kind in Kind if kind in carried)


def _label(items: Sequence[Item], head_groups: int) -> str:
    return " ".join(f"{item.kind.value}{item.index}{letter(item.head_group) if head_groups > 1 else ''}" for item in items)


def letter(head_group: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[head_group % 26]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def short(label: str) -> str:
    items = label.split()
    return label if len(items) <= 3 else f"{items[0]} {items[1]} +{len(items) - 2}"
