"""Proves that a schedule is a correct algorithm, by replaying it with names instead of numbers.

Every tile is computed exactly once; nothing is read before it arrives; every accumulator ends at its owner with exactly its own
tiles; buffers stay within the schedule's limits; both ends of every link list the same messages in the same order. A schedule
that passes computes the right attention, and one that fails does not: tests drop, duplicate and redirect every move of every
schedule to show both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import accumulate, product
from typing import Any

from ringattn._validation import instance, short_repr
from ringattn.errors import ScheduleError
from ringattn.schedule.ir import A_SCHEDULE, BufferLimits, Kind, Move, Schedule, Tile
from ringattn.schedule.program import Message, messages, program


def check(schedule: Schedule, alive: Collection[tuple[int, int]] | None = None) -> BufferLimits:
    """Proves `schedule`; returns the most foreign blocks of each kind that any rank holds.

    Args:
        schedule: the schedule to prove.
        alive: the tiles (i, j) that have work; by default all of them.

    Raises:
        ScheduleError: the schedule is not a correct algorithm; names step and item of the first fault.
    """
    instance("schedule", schedule, Schedule, ScheduleError, A_SCHEDULE)
    expected = (
        set(pairs_of(alive)) if alive is not None else set(product(range(len(schedule.q_owner)), range(len(schedule.kv_owner))))
    )
    _check_form(schedule)
    _check_result(_replay(schedule), schedule, expected)
    _check_links(schedule)
    highest = peak(schedule)
    if any(used > promised for used, promised in zip(highest, schedule.limits, strict=True)):
        raise ScheduleError(
            f"{schedule.name}: some rank holds {highest} foreign blocks, more than the promised {schedule.limits}"
        )
    return highest


def pairs_of(alive: Any) -> Collection[tuple[int, int]]:
    """Checks that `alive` is a collection of pairs of blocks, and returns it."""
    try:
        valid = isinstance(alive, Collection) and not isinstance(alive, str) and all(map(_is_pair, alive))
    except Exception:  # a tensor without dimensions
        valid = False
    if not valid:
        raise ScheduleError(f"alive={short_repr(alive)}; must be a collection of tiles (i, j)")
    pairs: Collection[tuple[int, int]] = alive
    return pairs


def _is_pair(tile: object) -> bool:
    return isinstance(tile, tuple) and len(tile) == 2 and all(isinstance(index, int) for index in tile)


def _check_form(schedule: Schedule) -> None:
    ranks = range(schedule.world)
    for move in schedule.moves:
        if move.src not in ranks or move.dst not in ranks or move.src == move.dst:
            raise ScheduleError(f"{schedule.name}: {move} does not go from one rank of {schedule.world} to another")
        if move.depart < 0 or move.arrival <= move.depart:
            raise ScheduleError(
                f"{schedule.name}: {move} departs in step {move.depart} and arrives no later, or before the first step"
            )
    for tile in schedule.tiles:
        if tile.step < 0 or tile.rank not in ranks:
            raise ScheduleError(f"{schedule.name}: {tile} is before the first step or on no rank of {schedule.world}")


def _replay(schedule: Schedule) -> dict[tuple[int, Kind, int], Counter[tuple[int, int]]]:
    """Runs all ranks with names instead of numbers: which tiles each accumulator contains at the end, on any rank."""
    resident = {(rank, Kind.Q, i) for i, rank in enumerate(schedule.q_owner)}
    resident |= {(rank, Kind.KV, j) for j, rank in enumerate(schedule.kv_owner)}
    gathered: dict[tuple[int, Kind, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    in_flight: dict[int, list[tuple[Move, Counter[tuple[int, int]]]]] = defaultdict(list)
    moves, tiles = _by_step(schedule)
    for step in range(schedule.steps):
        for move, content in in_flight.pop(step, []):
            if move.kind.moved:
                gathered[move.dst, move.kind, move.index] += content
            else:
                resident.add((move.dst, move.kind, move.index))
        for move in moves[step]:
            source = (move.src, move.kind, move.index)
            if source not in (gathered if move.kind.moved else resident):
                raise ScheduleError(f"{schedule.name}, step {step}: rank {move.src} does not hold what it sends in {move}")
            in_flight[move.arrival].append((move, gathered.pop(source) if move.kind.moved else Counter()))
        for tile in tiles[step]:
            for kind, index in ((Kind.Q, tile.i), (Kind.KV, tile.j)):
                if (tile.rank, kind, index) not in resident:
                    raise ScheduleError(
                        f"{schedule.name}, step {step}: rank {tile.rank} computes tile ({tile.i}, {tile.j}) "
                        f"but {kind.value}{index} has not arrived"
                    )
            gathered[tile.rank, Kind.Q_ACC, tile.i][tile.i, tile.j] += 1
            gathered[tile.rank, Kind.KV_ACC, tile.j][tile.i, tile.j] += 1
    return gathered


def _by_step(schedule: Schedule) -> tuple[dict[int, list[Move]], dict[int, list[Tile]]]:
    moves, tiles = defaultdict(list), defaultdict(list)
    for move in schedule.moves:
        moves[move.depart].append(move)
    for tile in schedule.tiles:
        tiles[tile.step].append(tile)
    return moves, tiles


def _check_result(
    gathered: dict[tuple[int, Kind, int], Counter[tuple[int, int]]], schedule: Schedule, expected: set[tuple[int, int]]
) -> None:
    idle = {(tile.i, tile.j) for tile in schedule.tiles} - expected
    if idle:
        raise ScheduleError(f"{schedule.name}: tiles {sorted(idle)} have no work but are computed; prune them")
    for kind, axis in ((Kind.Q_ACC, 0), (Kind.KV_ACC, 1)):
        tiles_of_block: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for tile in expected:
            tiles_of_block[tile[axis]].add(tile)
        for (rank, gathered_kind, index), tiles in gathered.items():
            if gathered_kind is kind and rank != schedule.owner(kind, index):
                raise ScheduleError(
                    f"{schedule.name}: {kind.value}{index} with tiles {sorted(tiles)} is left behind at rank {rank}"
                )
        for index, complete in tiles_of_block.items():
            actual = gathered[schedule.owner(kind, index), kind, index]
            if actual != Counter(complete):
                missing, extra = sorted(complete - set(actual)), sorted((actual - Counter(complete)).elements())
                raise ScheduleError(
                    f"{schedule.name}: {kind.value}{index} returns to its owner without {missing} and with {extra} too many"
                )


def _check_links(schedule: Schedule) -> None:
    """Checks that both ends of each link, each from its own program, list the same messages in the same order."""
    for backward in (False, True):
        sent = messages([schedule], backward=backward)
        links: dict[tuple[int, int, int], list[tuple[int, Message]]] = defaultdict(list)
        for rank in range(schedule.world):
            for step in program([schedule], sent, rank):
                for message in step.post:
                    links[message.src, message.dst, rank].append((step.number, message))
        for src, dst in {(src, dst) for src, dst, _ in links}:
            if links[src, dst, src] != links[src, dst, dst]:
                raise ScheduleError(f"{schedule.name}: ranks {src} and {dst} disagree on the order of messages between them")


def peak(schedule: Schedule) -> BufferLimits:
    """The most foreign blocks of each kind that any rank holds in any step, buffers of moves in flight included."""
    instance("schedule", schedule, Schedule, ScheduleError, A_SCHEDULE)
    change: dict[tuple[Kind, int], Counter[int]] = defaultdict(Counter)  # by step, for each kind and rank
    last_read: dict[tuple[int, Kind, int], int] = {}
    first_written: dict[tuple[int, Kind, int], list[int]] = defaultdict(list)

    def occupy(kind: Kind, rank: int, start: int, stop: int) -> None:
        if start < stop:
            change[kind, rank][start] += 1
            change[kind, rank][stop] -= 1

    for step, rank, i, j in schedule.tiles:
        for item in ((rank, Kind.Q, i), (rank, Kind.KV, j)):
            last_read[item] = max(step, last_read.get(item, 0))
        if schedule.q_owner[i] != rank:
            first_written[rank, Kind.Q_ACC, i].append(step)
        if schedule.kv_owner[j] != rank:
            first_written[rank, Kind.KV_ACC, j].append(step)
    for kind, index, src, _, depart, _ in schedule.moves:
        last_read[src, kind, index] = max(depart, last_read.get((src, kind, index), 0))
    for kind, index, src, dst, depart, arrival in schedule.moves:
        # The receiver's buffer: until merged for an accumulator, until last read for an input.
        occupy(kind, dst, depart, arrival if kind.moved else max(arrival, last_read.get((dst, kind, index), 0) + 1))
        if kind.moved:
            # The sender's: from the first share computed or merged there until the transfer is complete.
            occupy(kind, src, min((s for s in first_written[src, kind, index] if s < depart), default=depart), arrival)
    highest = dict.fromkeys(Kind, 0)
    for (kind, _), steps in change.items():
        highest[kind] = max(highest[kind], *accumulate(steps[step] for step in sorted(steps)))
    return BufferLimits(highest[Kind.Q], highest[Kind.KV], highest[Kind.Q_ACC], highest[Kind.KV_ACC])
