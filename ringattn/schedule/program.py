"""Derives each rank's program from the global schedule: what one rank receives, sends and computes, step by step.

Head groups (schedules that run at the same time on different heads) are interleaved here; moves between the same two ranks with
the same departure and arrival step share one message. Every rank filters the same ordered list of messages, so sends and
receives on a link have the same order at both ends, which is all that NCCL (it ignores tags) and gloo need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ringattn.schedule.ir import Kind, Schedule

# Partial results of one accumulator that may wait to be merged together; more would need more memory for little less traffic.
MERGED_AT_ONCE = 4


class Item(NamedTuple):
    """`kind[index]` of one head group; with `new`, a message of backward has only the fields that forward did not have."""

    head_group: int
    kind: Kind
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used here
    new: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}{f' of head group {self.head_group}' if self.head_group else ''}"


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles of one head group that are computed together: all tiles between query blocks `i` and key blocks `j`.

    Each is created once for a program and equal only to itself, so that lookups by it, in every call, are fast.
    """

    head_group: int
    i: tuple[int, ...]
    j: tuple[int, ...]

    @cached_property
    def inputs(self) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        """The query blocks and the key blocks."""
        return tuple(Item(self.head_group, Kind.Q, n) for n in self.i), tuple(Item(self.head_group, Kind.KV, n) for n in self.j)

    def __str__(self) -> str:
        return f"tile({'+'.join(map(str, self.i))},{'+'.join(map(str, self.j))})"


@dataclass(frozen=True, eq=False)
class Message:
    """The items that `src` sends to `dst` together. Each is created once for all ranks and equal only to itself."""

    src: int
    dst: int
    depart: int
    arrival: int
    items: tuple[Item, ...]

    def __str__(self) -> str:
        # Event logs record this text, so its wording is pinned.
        items = ", ".join(map(str, self.items))
        return f"{items} from rank {self.src} to rank {self.dst}, departing in step {self.depart}, due in step {self.arrival}"


@dataclass(frozen=True)
class Step:
    """One step of one rank, in order: receive, post, compute, release."""

    number: int
    arrival: tuple[Message, ...]  # sent or received by this rank, to be complete now
    post: tuple[Message, ...]  # sent or received by this rank, from now on
    tiles: tuple[TileBatch, ...]
    release: tuple[Item, ...]  # foreign inputs not read again

    def __str__(self) -> str:
        return f"step{self.number}"


def messages(head_groups: Sequence[Schedule], *, backward: bool, reuse_inputs: bool = False) -> tuple[Message, ...]:
    """All messages of all ranks in one global order. Forward has no gradients of KV to move.

    With `reuse_inputs`, inputs on resident ranks other than their owners are still there in backward: keys and values are not
    sent again, and of queries only the new fields.
    """
    groups: dict[tuple[int, int, int, int], list[Item]] = defaultdict(list)
    moves = ((move, head_group) for head_group, schedule in enumerate(head_groups) for move in schedule.moves)
    for move, head_group in sorted(moves, key=lambda pair: (pair[0].depart, pair[0].arrival)):
        only_new = reuse_inputs and backward and head_groups[head_group].moves_to_resident(move)
        if (backward or move.kind is not Kind.KV_ACC) and not (only_new and move.kind is Kind.KV):
            groups[move.depart, move.arrival, move.src, move.dst].append(Item(head_group, move.kind, move.index, only_new))
    unordered = [Message(src, dst, depart, arrival, tuple(items)) for (depart, arrival, src, dst), items in groups.items()]
    world = head_groups[0].world if head_groups else 1
    return tuple(sorted(unordered, key=lambda m: (m.depart, m.arrival, (m.dst - m.src) % world)))


def program(
    head_groups: Sequence[Schedule], sent: Iterable[Message], rank: int, *, reuse_inputs: bool = False
) -> tuple[Step, ...]:
    """The steps of `rank`, given all messages (see `messages`). Steps in which it does nothing are left out.

    With `reuse_inputs`, inputs whose resident rank is `rank` are not released.
    """
    own = [m for m in sent if rank in (m.src, m.dst)]
    arrival, post = defaultdict(list), defaultdict(list)
    for message in own:
        arrival[message.arrival].append(message)
        post[message.depart].append(message)
    tiles = _tile_batches(head_groups, rank)
    release = _releases(head_groups, own, tiles, rank, reuse_inputs)
    return tuple(
        Step(n, tuple(arrival[n]), tuple(post[n]), tuple(tiles[n]), tuple(release[n]))
        for n in range(max((s.steps for s in head_groups), default=0))
        if arrival[n] or post[n] or tiles[n]
    )


def _tile_batches(head_groups: Sequence[Schedule], rank: int) -> dict[int, list[TileBatch]]:
    """The tiles of every step; those that one kernel call can compute are put together."""
    batches: dict[int, list[TileBatch]] = defaultdict(list)
    for head_group, schedule in enumerate(head_groups):
        steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for tile in schedule.tiles:
            if tile.rank == rank:
                steps[tile.step].append((tile.i, tile.j))
        for step, tiles in steps.items():
            rectangles = [((i,), (j,)) for i, j in tiles] if len(tiles) == 1 else _rectangles(tiles, schedule)
            batches[step] += [TileBatch(head_group, i, j) for i, j in rectangles]
    return batches


def _rectangles(tiles: Sequence[tuple[int, int]], schedule: Schedule) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cover `tiles` with products of rows and columns that contain no other tile with work: fewer, larger kernel calls."""
    elsewhere = {(tile.i, tile.j) for tile in schedule.tiles} - set(tiles)
    rows: dict[int, set[int]] = defaultdict(set)
    for i, j in tiles:
        rows[i].add(j)
    rectangles: list[tuple[list[int], set[int]]] = []
    for i in sorted(rows):
        for blocks, columns in rectangles:
            joined = columns | rows[i]
            if not any((n, j) in elsewhere for n in [*blocks, i] for j in joined):
                blocks.append(i)
                columns |= rows[i]
                break
        else:
            rectangles.append(([i], set(rows[i])))
    return [(tuple(blocks), tuple(sorted(columns))) for blocks, columns in rectangles]


def _releases(
    head_groups: Sequence[Schedule],
    own: Iterable[Message],
    tiles: Mapping[int, Sequence[TileBatch]],
    rank: int,
    reuse_inputs: bool,
) -> dict[int, list[Item]]:
    last: dict[Item, int] = {}
    for message in own:
        for item in message.items:
            step = message.depart if message.src == rank else message.arrival
            item = item._replace(new=False)
            last[item] = max(step, last.get(item, 0))
    for step, batches in tiles.items():
        for batch in batches:
            read = [item for items in batch.inputs for item in items]
            for item in read:
                last[item] = max(step, last.get(item, 0))
    release: dict[int, list[Item]] = defaultdict(list)
    for item, step in last.items():
        schedule = head_groups[item.head_group]
        stays = reuse_inputs and schedule.resident_rank(item.kind, item.index) == rank
        if not item.kind.moved and not stays and schedule.owner(item.kind, item.index) != rank:
            release[step].append(item)
    return release
