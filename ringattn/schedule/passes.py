"""Schedules in, schedules out.

`prune` drops the tiles a mask leaves empty and every move nobody reads. `side_by_side` runs two schedules at once, each on its
own half of every rank's keys. Neither knows masks or layouts: `prune` is told which tiles have work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

from ringattn.errors import PlanError
from ringattn.schedule.ir import Kind, Move, Room, Schedule, Tile, make


def prune(schedule: Schedule, alive: Collection[tuple[int, int]]) -> Schedule:
    """Keep only tiles in `alive` and the moves that still serve one."""
    tiles = tuple(t for t in schedule.tiles if (t.i, t.j) in alive)
    kept = _carrying(schedule, tiles) | _read(schedule, tiles)
    return replace(schedule, tiles=tiles, moves=tuple(m for n, m in enumerate(schedule.moves) if n in kept))


def _read(schedule: Schedule, tiles: tuple[Tile, ...]) -> set[int]:
    """Input moves whose receiver reads or forwards the block later. Latest first: to forward is to read at the source."""
    last_read: dict[tuple[int, Kind, int], int] = defaultdict(lambda: -1)
    for tile in tiles:
        for item in ((tile.rank, Kind.Q, tile.i), (tile.rank, Kind.KV, tile.j)):
            last_read[item] = max(last_read[item], tile.step)
    kept = set()
    for n, move in reversed(list(enumerate(schedule.moves))):
        if not move.kind.moved and last_read[move.dst, move.kind, move.index] >= move.due:
            kept.add(n)
            source = (move.src, move.kind, move.index)
            last_read[source] = max(last_read[source], move.depart)
    return kept


def _carrying(schedule: Schedule, tiles: tuple[Tile, ...]) -> set[int]:
    """Accumulator moves that leave with something in them."""
    filled: set[tuple[int, Kind, int]] = set()
    arriving: dict[int, list[Move]] = defaultdict(list)
    kept = set()
    departing, working = defaultdict(list), defaultdict(list)
    for n, move in enumerate(schedule.moves):
        departing[move.depart].append((n, move))
    for tile in tiles:
        working[tile.step].append(tile)
    for step in range(schedule.steps):
        filled |= {(m.dst, m.kind, m.index) for m in arriving[step]}
        for n, move in departing[step]:
            item = (move.src, move.kind, move.index)
            if move.kind.moved and item in filled:
                filled.remove(item)
                kept.add(n)
                arriving[move.due].append(move)
        for tile in working[step]:
            filled |= {(tile.rank, Kind.Q_ACC, tile.i), (tile.rank, Kind.KV_ACC, tile.j)}
    return kept


def side_by_side(a: Schedule, b: Schedule) -> Schedule:
    """Both at once over the same queries: `a` on the first half of every rank's keys, `b` on the second.

    For schedules in which queries and their results stay at home. It is how two directions share the work when there are too
    few KV heads to share.
    """
    if any(m.kind.of_queries for m in a.moves + b.moves):
        raise PlanError(
            f"{a.name} and {b.name} cannot share the keys of one head: in one of them queries travel, and would twice"
        )
    shift = len(a.kv_home)
    tiles = [*a.tiles, *(t._replace(j=t.j + shift) for t in b.tiles)]
    moves = [*a.moves, *(m._replace(index=m.index + shift) for m in b.moves)]
    room = Room(*(x + y for x, y in zip(a.room, b.room, strict=True)))
    return make(f"{a.name}+{b.name}", a.world, tiles, moves, room, (a.q_home, a.kv_home + b.kv_home))
