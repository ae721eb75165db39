"""From the one global schedule to what a single rank does, step by step.

Lanes (schedules that run at the same time on different heads) are interleaved here; moves between the same two ranks with the
same departure and due step share one message. Every rank filters the same ordered list of messages, so sends and receives on a
link come in the same order at both ends, which is all that NCCL (it ignores tags) and gloo need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringattn.schedule.ir import Kind, Schedule


class Item(NamedTuple):
    """`kind[index]` of one lane."""

    lane: int
    kind: Kind
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}{f' of lane {self.lane}' if self.lane else ''}"


class Work(NamedTuple):
    """Tile (i, j) of one lane."""

    lane: int
    i: int
    j: int


@dataclass(frozen=True)
class Message:
    """What goes from `src` to `dst` in one piece."""

    src: int
    dst: int
    depart: int
    due: int
    items: tuple[Item, ...]

    def __str__(self) -> str:
        items = ", ".join(map(str, self.items))
        return f"{items} from rank {self.src} to rank {self.dst}, departing in step {self.depart}, due in step {self.due}"


@dataclass(frozen=True)
class Step:
    """One step of one rank, in the order it happens: take in, post, compute, let go."""

    number: int
    due: tuple[Message, ...]  # sent or received by this rank, to be complete now
    post: tuple[Message, ...]  # sent or received by this rank, from now on
    tiles: tuple[Work, ...]
    release: tuple[Item, ...]  # foreign inputs not read again


def messages(lanes: Sequence[Schedule], *, backward: bool) -> tuple[Message, ...]:
    """All messages of all ranks in their one global order. Forward has no gradients of KV to move."""
    groups: dict[tuple[int, int, int, int], list[Item]] = defaultdict(list)
    moves = ((move, lane) for lane, schedule in enumerate(lanes) for move in schedule.moves)
    for move, lane in sorted(moves, key=lambda pair: pair[0].depart):
        if backward or move.kind is not Kind.KV_ACC:
            groups[move.depart, move.due, move.src, move.dst].append(Item(lane, move.kind, move.index))
    return tuple(Message(src, dst, depart, due, tuple(items)) for (depart, due, src, dst), items in groups.items())


def program(lanes: Sequence[Schedule], sent: Iterable[Message], rank: int) -> tuple[Step, ...]:
    """The steps of `rank`, given all messages (see `messages`). Steps in which it does nothing are left out."""
    mine = [m for m in sent if rank in (m.src, m.dst)]
    due, post, tiles = defaultdict(list), defaultdict(list), defaultdict(list)
    for message in mine:
        due[message.due].append(message)
        post[message.depart].append(message)
    for lane, schedule in enumerate(lanes):
        for tile in schedule.tiles:
            if tile.rank == rank:
                tiles[tile.step].append(Work(lane, tile.i, tile.j))
    release = _last_reads(lanes, mine, tiles, rank)
    return tuple(
        Step(n, tuple(due[n]), tuple(post[n]), tuple(tiles[n]), tuple(release[n]))
        for n in range(max((s.steps for s in lanes), default=0))
        if due[n] or post[n] or tiles[n]
    )


def _last_reads(
    lanes: Sequence[Schedule], mine: Iterable[Message], tiles: dict[int, list[Work]], rank: int
) -> dict[int, list[Item]]:
    last: dict[Item, int] = {}
    for message in mine:
        for item in message.items:
            step = message.depart if message.src == rank else message.due
            last[item] = max(step, last.get(item, 0))
    for step, works in tiles.items():
        for lane, i, j in works:
            for item in (Item(lane, Kind.Q, i), Item(lane, Kind.KV, j)):
                last[item] = max(step, last.get(item, 0))
    release: dict[int, list[Item]] = defaultdict(list)
    for item, step in last.items():
        if not item.kind.moved and lanes[item.lane].home(item.kind, item.index) != rank:
            release[step].append(item)
    return release
