"""Schedules in, schedules out.

`prune` drops the tiles a mask leaves empty and every move nobody reads. `split` cuts every block into parts that travel by
themselves, `divide` into parts that stay together. `both_ways` gives the lanes of a schedule and its mirror image.
`side_by_side` runs two schedules at once, each on its own half of every rank's keys. None of them knows masks or layouts:
`prune` is told which tiles have work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace

from ringattn._validation import instance, shown, whole
from ringattn.errors import PlanError
from ringattn.schedule.check import pairs_of, peak
from ringattn.schedule.ir import A_SCHEDULE, Kind, Move, Room, Schedule, Tile, make

MOST_TILES = 1 << 24


def prune(schedule: Schedule, alive: Collection[tuple[int, int]]) -> Schedule:
    """Keep only tiles in `alive` and the moves that still serve one."""
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    alive = pairs_of(alive)
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


def split(schedule: Schedule, *, q: int = 1, kv: int = 1) -> Schedule:
    """Cut every block of queries into `q` parts and every block of keys into `kv`, each computed and sent by itself.

    A step becomes q * kv steps, parts of queries outermost. A part is due when it is first read and leaves, if it is a result,
    as soon as its last tile is done; so the first tile starts before a whole block is there, and the first partial is home
    before the last is computed. After `prune` only the parts that a mask needs travel: under causal, half of a zigzag shard.
    """
    q, kv = parts_of("split", schedule, q, kv)
    steps = q * kv

    def parts(kind: Kind) -> Iterator[tuple[int, int, int]]:
        """Number, first and last use within a step of each part of a block."""
        for n in range(q if kind.of_queries else kv):
            yield n, *((n * kv, n * kv + kv - 1) if kind.of_queries else (n, steps - kv + n))

    tiles = [
        Tile(t.step * steps + m * kv + n, t.rank, t.i * q + m, t.j * kv + n)
        for t in schedule.tiles
        for m in range(q)
        for n in range(kv)
    ]
    moves = []
    for move in schedule.moves:
        for n, first, last in parts(move.kind):
            # An input is needed at its first use; a result is complete after the last one of the step before.
            shift = last + 1 - steps if move.kind.moved else first
            index = move.index * (q if move.kind.of_queries else kv) + n
            at_home = not move.kind.moved and move.src == schedule.home(move.kind, move.index)
            depart = move.depart * steps + (0 if at_home else shift)
            moves.append(move._replace(index=index, depart=depart, due=move.due * steps + shift))
    homes = tuple(h for h in schedule.q_home for _ in range(q)), tuple(h for h in schedule.kv_home for _ in range(kv))
    parted = make(f"{schedule.name}/{q}x{kv}", schedule.world, tiles, moves, schedule.room, homes)
    return replace(parted, room=peak(parted))


def divide(schedule: Schedule, *, q: int = 1, kv: int = 1) -> Schedule:
    """Cut every block into parts that are computed and travel in the same steps: those that `prune` drops are all it saves."""
    q, kv = parts_of("divide", schedule, q, kv)
    tiles = [t._replace(i=t.i * q + m, j=t.j * kv + n) for t in schedule.tiles for m in range(q) for n in range(kv)]
    moves = []
    for move in schedule.moves:
        parts = q if move.kind.of_queries else kv
        moves += [move._replace(index=move.index * parts + n) for n in range(parts)]
    homes = tuple(h for h in schedule.q_home for _ in range(q)), tuple(h for h in schedule.kv_home for _ in range(kv))
    divided = make(f"{schedule.name}|{q}x{kv}", schedule.world, tiles, moves, schedule.room, homes)
    return replace(divided, room=peak(divided))


def parts_of(call: str, schedule: Schedule, q: int, kv: int) -> tuple[int, int]:
    """Into how many parts `call` cuts blocks of queries and of keys."""
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    q, kv = whole("q", q, PlanError), whole("kv", kv, PlanError)
    said = f"{call}(q={shown(q)}, kv={shown(kv)})"
    if min(q, kv) < 1:
        raise PlanError(f"{said}: a block has at least one part")
    if max(q, kv) * q * kv * max(1, len(schedule.tiles)) > MOST_TILES:
        raise PlanError(f"{said}: of {len(schedule.tiles)} tiles that makes more than {MOST_TILES:,}; cut into fewer parts")
    return q, kv


def both_ways(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The schedule and its mirror image, for two lanes: what one sends up the ranks the other sends down, at the same time.

    Rank r takes the part of rank world - 1 - r, with its blocks; so what was a row of a mesh, or a node, still is.
    """
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    last, last_q, last_kv = schedule.world - 1, len(schedule.q_home) - 1, len(schedule.kv_home) - 1
    per_q, per_kv = (len(homes) // schedule.world for homes in (schedule.q_home, schedule.kv_home))
    if schedule.q_home != tuple(n // max(1, per_q) for n in range(last_q + 1)) or schedule.resting:
        raise PlanError(
            f"{schedule.name} has no mirror image: its ranks own different numbers of blocks, or some rest elsewhere"
        )

    def block(index: int, per: int, final: int) -> int:
        """The same part of the opposite rank's rows."""
        return final - index - (per - 1) + 2 * (index % per)

    tiles = [Tile(t.step, last - t.rank, block(t.i, per_q, last_q), block(t.j, per_kv, last_kv)) for t in schedule.tiles]
    moves = [
        m._replace(
            index=block(m.index, per_q, last_q) if m.kind.of_queries else block(m.index, per_kv, last_kv),
            src=last - m.src,
            dst=last - m.dst,
        )
        for m in schedule.moves
    ]
    homes = schedule.q_home, schedule.kv_home
    return schedule, make(f"{schedule.name}, mirrored", schedule.world, tiles, moves, schedule.room, homes)


def side_by_side(a: Schedule, b: Schedule) -> Schedule:
    """Both at once over the same queries: `a` on the first half of every rank's keys, `b` on the second.

    For schedules in which queries and their results stay at home. It is how two directions share the work when there are too
    few KV heads to share.
    """
    for name, one in (("a", a), ("b", b)):
        instance(name, one, Schedule, PlanError, A_SCHEDULE)
    if (a.world, a.q_home) != (b.world, b.q_home):
        raise PlanError(
            f"{a.name} and {b.name} are for other ranks or blocks of queries; run schedules for the same ones side by side"
        )
    if any(m.kind.of_queries for m in a.moves + b.moves):
        raise PlanError(
            f"{a.name} and {b.name} cannot share the keys of one head: in one of them queries travel, and would twice"
        )
    shift = len(a.kv_home)
    tiles = [*a.tiles, *(t._replace(j=t.j + shift) for t in b.tiles)]
    moves = [*a.moves, *(m._replace(index=m.index + shift) for m in b.moves)]
    room = Room(*(x + y for x, y in zip(a.room, b.room, strict=True)))
    return make(f"{a.name}+{b.name}", a.world, tiles, moves, room, (a.q_home, a.kv_home + b.kv_home))
