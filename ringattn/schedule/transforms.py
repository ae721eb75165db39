"""Transforms schedules into other schedules.

`prune` drops the tiles that a mask leaves empty and every move that no rank reads. `split` cuts every block into parts that
travel separately, `divide` into parts that stay together. `both_ways` returns a schedule and its mirror image, for two head
groups. `side_by_side` runs two schedules at once, each on its own half of every rank's keys. Masks and layouts are not known
here: `prune` receives the tiles that have work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace

from ringattn._validation import as_int, instance, short_repr
from ringattn.errors import PlanError
from ringattn.schedule.check import pairs_of, peak
from ringattn.schedule.ir import A_SCHEDULE, BufferLimits, Kind, Move, Schedule, Tile, make

MOST_TILES = 1 << 24


def prune(schedule: Schedule, alive: Collection[tuple[int, int]]) -> Schedule:
    """Keeps the tiles in `alive` and the moves that still serve one of them."""
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    alive = pairs_of(alive)
    tiles = tuple(t for t in schedule.tiles if (t.i, t.j) in alive)
    kept_moves = _carrying(schedule, tiles) | _read(schedule, tiles)
    return replace(schedule, tiles=tiles, moves=tuple(m for n, m in enumerate(schedule.moves) if n in kept_moves))


def _read(schedule: Schedule, tiles: tuple[Tile, ...]) -> set[int]:
    """Input moves whose receiver reads or forwards the block later. Latest first, since forwarding reads at the source."""
    last_read: dict[tuple[int, Kind, int], int] = defaultdict(lambda: -1)
    for tile in tiles:
        for item in ((tile.rank, Kind.Q, tile.i), (tile.rank, Kind.KV, tile.j)):
            last_read[item] = max(last_read[item], tile.step)
    kept_moves = set()
    for n, move in reversed(list(enumerate(schedule.moves))):
        if not move.kind.moved and last_read[move.dst, move.kind, move.index] >= move.arrival:
            kept_moves.add(n)
            source = (move.src, move.kind, move.index)
            last_read[source] = max(last_read[source], move.depart)
    return kept_moves


def _carrying(schedule: Schedule, tiles: tuple[Tile, ...]) -> set[int]:
    """Accumulator moves that carry a partial result."""
    filled: set[tuple[int, Kind, int]] = set()
    arriving: dict[int, list[Move]] = defaultdict(list)
    kept_moves = set()
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
                kept_moves.add(n)
                arriving[move.arrival].append(move)
        for tile in working[step]:
            filled |= {(tile.rank, Kind.Q_ACC, tile.i), (tile.rank, Kind.KV_ACC, tile.j)}
    return kept_moves


def split(schedule: Schedule, *, q: int = 1, kv: int = 1) -> Schedule:
    """Cuts every block of queries into `q` parts and every block of keys into `kv`, each computed and sent separately.

    A step becomes q * kv steps, parts of queries outermost. The arrival step of a part is the step that first reads it, and a
    result leaves as soon as its last tile is computed; so the first tile starts before a complete block has arrived, and the
    first partial result is back at its owner before the last is computed. After `prune` only the parts that a mask needs
    travel: under causal, half of a zigzag shard.
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
            from_owner = not move.kind.moved and move.src == schedule.owner(move.kind, move.index)
            depart = move.depart * steps + (0 if from_owner else shift)
            moves.append(move._replace(index=index, depart=depart, arrival=move.arrival * steps + shift))
    owners = tuple(h for h in schedule.q_owner for _ in range(q)), tuple(h for h in schedule.kv_owner for _ in range(kv))
    split_schedule = make(f"{schedule.name}/{q}x{kv}", schedule.world, tiles, moves, schedule.limits, owners)
    return replace(split_schedule, limits=peak(split_schedule))


def divide(schedule: Schedule, *, q: int = 1, kv: int = 1) -> Schedule:
    """Cuts every block into parts that are computed and travel in the same steps; the gain is what `prune` then drops."""
    q, kv = parts_of("divide", schedule, q, kv)
    tiles = [t._replace(i=t.i * q + m, j=t.j * kv + n) for t in schedule.tiles for m in range(q) for n in range(kv)]
    moves = []
    for move in schedule.moves:
        parts = q if move.kind.of_queries else kv
        moves += [move._replace(index=move.index * parts + n) for n in range(parts)]
    owners = tuple(h for h in schedule.q_owner for _ in range(q)), tuple(h for h in schedule.kv_owner for _ in range(kv))
    divided = make(f"{schedule.name}|{q}x{kv}", schedule.world, tiles, moves, schedule.limits, owners)
    return replace(divided, limits=peak(divided))


def parts_of(call: str, schedule: Schedule, q: int, kv: int) -> tuple[int, int]:
    """Checks into how many parts `call` cuts blocks of queries and of keys."""
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    q, kv = as_int("q", q, PlanError), as_int("kv", kv, PlanError)
    call_text = f"{call}(q={short_repr(q)}, kv={short_repr(kv)})"
    if min(q, kv) < 1:
        raise PlanError(f"{call_text}: a block has at least one part")
    if max(q, kv) * q * kv * max(1, len(schedule.tiles)) > MOST_TILES:
        raise PlanError(
            f"{call_text}: with {len(schedule.tiles)} tiles that makes more than {MOST_TILES:,}; cut into fewer parts"
        )
    return q, kv


def both_ways(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The schedule and its mirror image, for two head groups: at any time one sends up the ranks what the other sends down.

    In the mirror image rank r has the role and the blocks of rank world - 1 - r, so rows of a mesh, and nodes, are preserved.
    """
    instance("schedule", schedule, Schedule, PlanError, A_SCHEDULE)
    last, last_q, last_kv = schedule.world - 1, len(schedule.q_owner) - 1, len(schedule.kv_owner) - 1
    per_q, per_kv = (len(owners) // schedule.world for owners in (schedule.q_owner, schedule.kv_owner))
    if schedule.q_owner != tuple(n // max(1, per_q) for n in range(last_q + 1)) or schedule.has_residents:
        raise PlanError(
            f"{schedule.name} has no mirror image: its ranks own different numbers of blocks, "
            "or inputs stay at other ranks than their owners"
        )

    def block(index: int, per: int, final: int) -> int:
        """The block with the same part of the opposite rank's rows."""
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
    owners = schedule.q_owner, schedule.kv_owner
    return schedule, make(f"{schedule.name}, mirrored", schedule.world, tiles, moves, schedule.limits, owners)


def side_by_side(a: Schedule, b: Schedule) -> Schedule:
    """Runs both schedules at once over the same queries: `a` on the first half of every rank's keys, `b` on the second.

    For schedules in which queries and their results stay at their owners. Two directions share the work this way when there are
    too few KV heads to share.
    """
    for name, value in (("a", a), ("b", b)):
        instance(name, value, Schedule, PlanError, A_SCHEDULE)
    if (a.world, a.q_owner) != (b.world, b.q_owner):
        raise PlanError(f"{a.name} and {b.name} have different ranks or blocks of queries; pass schedules that have the same")
    if any(m.kind.of_queries for m in a.moves + b.moves):
        raise PlanError(
            f"{a.name} and {b.name} cannot share the keys of one head: queries travel in one of them, and would travel twice"
        )
    shift = len(a.kv_owner)
    tiles = [*a.tiles, *(t._replace(j=t.j + shift) for t in b.tiles)]
    moves = [*a.moves, *(m._replace(index=m.index + shift) for m in b.moves)]
    limits = BufferLimits(*(x + y for x, y in zip(a.limits, b.limits, strict=True)))
    return make(f"{a.name}+{b.name}", a.world, tiles, moves, limits, (a.q_owner, a.kv_owner + b.kv_owner))
