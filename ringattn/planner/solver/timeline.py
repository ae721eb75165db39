"""Turns an assignment of tiles to ranks into a schedule, by simulating all ranks on one clock.

`next_batch` chooses what a rank computes next among the tiles whose blocks have arrived: rows times columns, up to a grain of
work. First comes the foreign block that it can finish soonest, since its result then leaves; then other work on foreign blocks;
work on its own blocks alone comes last. So that is left for the beginning, when nothing else has arrived yet, and for the end,
when the last results travel. Fewer and larger kernel calls are better, but nothing can be received or sent during one.

`Timeline` decides when each rank computes and sends what. Real machines are not known here, so the clock is the tightest one
that lets all transfers be hidden: while the rank with most work computes, the busiest port (or link) just carries its bytes.
Each free port or rank takes what is most urgent:

    a port    the block for the rank that will first run out of work on foreign blocks, and for that rank the one that enables
              most work for its bytes; results fill the gaps. No rank is sent more than a window of work ahead
    a rank    the batch that `next_batch` chooses

`schedule_of` cuts the clock into steps; what begins in a step belongs to it. A step lasts about half as long as the largest
batch. An input leaves a little before the timeline sends it, since real links may be slower, but no more than `lookahead` steps
before it is first read, and arrives in the step that reads it. A result leaves in the step after its last tile, straight to the
owner, which receives it at most `lookahead` steps later: late enough that no rank waits for it, and early enough that its
buffers are soon free again. Within a step, moves are in the order in which the timeline begins them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from typing import NamedTuple

from ringattn.errors import PlanError
from ringattn.planner.solver.problem import Assignment, Problem, Resource, measure, visits
from ringattn.schedule.check import peak
from ringattn.schedule.ir import BufferLimits, Kind, Move, Schedule, Tile, make


def next_batch(problem: Problem, rank: int, left: Collection[int], present: Collection[int], grain: int) -> tuple[int, ...]:
    """The next tiles of `rank`, among those `left` whose blocks are `present`. A single tile may exceed the grain."""
    runnable = {tile for tile in left if ready(problem, tile, present)}
    lines = {line for tile in runnable for line in problem.sides[tile]}
    if not lines:
        return ()
    first = min(lines, key=lambda line: _delay(problem, line, rank, left, runnable))
    chosen = _fill(problem, [tile for tile in problem.lines[first].tiles if tile in runnable], grain)
    crossings = {_crossing(problem, tile, first) for tile in chosen}
    for line in sorted(lines - {first}):
        if _same_side(problem, line, first, rank):
            more = [t for t in problem.lines[line].tiles if t in runnable and _crossing(problem, t, line) in crossings]
            if len(more) == len(crossings) and sum(problem.area[tile] for tile in chosen + more) <= grain:
                chosen += more
    return tuple(sorted(chosen))


def ready(problem: Problem, tile: int, lines: Collection[int]) -> bool:
    """Whether both blocks of `tile` are among `lines`."""
    a, b = problem.sides[tile]
    return a in lines and b in lines


def _delay(problem: Problem, line: int, rank: int, left: Collection[int], runnable: set[int]) -> tuple[int, int, int]:
    """Sort key; least for the block to compute on first."""
    remaining = [tile for tile in problem.lines[line].tiles if tile in left]
    area = sum(problem.area[tile] for tile in remaining)
    if problem.lines[line].owner == rank:
        return 3, area, line
    if not problem.lines[line].bytes_back:
        return 2, area, line
    return int(not runnable.issuperset(remaining)), area, line


def _fill(problem: Problem, tiles: Sequence[int], grain: int) -> list[int]:
    chosen: list[int] = []
    area = 0
    for tile in tiles:
        area += problem.area[tile]
        if chosen and area > grain:
            break
        chosen.append(tile)
    return chosen


def _same_side(problem: Problem, line: int, other: int, rank: int) -> bool:
    """Whether both lines are queries or both keys, and both own or both foreign."""
    a, b = problem.lines[line], problem.lines[other]
    return a.kind is b.kind and (a.owner == rank) is (b.owner == rank)


def _crossing(problem: Problem, tile: int, line: int) -> int:
    a, b = problem.sides[tile]
    return b if a == line else a


GRAINS = 12  # the work of the busiest rank is cut into this many, unless its tiles are larger


class Batch(NamedTuple):
    """Tiles that `rank` computes together."""

    start: int
    rank: int
    tiles: tuple[int, ...]


class Transfer(NamedTuple):
    """The inputs of a block to a visited rank, or the result of the visit back to the owner."""

    start: int
    line: int
    rank: int
    returning: bool


class Timeline:
    """All ranks of one assignment on one clock: `batches` and `transfers` in the order in which they begin."""

    def __init__(self, problem: Problem, ranks: Sequence[int], window: int) -> None:
        self.problem, self.lines = problem, problem.lines
        totals = measure(problem, dict(zip(problem.tiles, ranks, strict=True)))
        # A pair takes `per_pair`, a byte `per_byte`: then the busiest rank and the busiest resource take equally long.
        self.per_byte, self.per_pair = max(1, totals.load), max(1, totals.link if problem.objective == "link" else totals.port)
        self.grain = max(totals.load // GRAINS, *problem.area, 1)  # the most work of a batch
        self.step = max(1, self.grain * self.per_pair // 2)
        self.window = max(1, window * self.grain // 2)
        world = range(problem.world)
        self.left: list[set[int]] = [set() for _ in world]  # tiles not begun
        for tile, rank in enumerate(ranks):
            self.left[rank].add(tile)
        own = [{n for n, line in enumerate(self.lines) if line.owner == rank} for rank in world]
        self.present, self.incoming = (
            own,
            [set(lines) for lines in own],
        )  # blocks at each rank, and those on their way there too
        self.unsent: list[set[int]] = [set() for _ in world]
        self.share: dict[tuple[int, int], set[int]] = {}  # tiles not finished of each visit
        for n, rank in visits(problem, ranks):
            self.unsent[rank].add(n)
            self.share[n, rank] = {tile for tile in self.lines[n].tiles if ranks[tile] == rank}
        self.finished: list[tuple[int, int]] = []
        self.busy: set[int] = set()
        self.free: dict[Resource, int] = {}
        self.batches: list[Batch] = []
        self.transfers: list[Transfer] = []
        self._simulate()

    def _simulate(self) -> None:
        events: list[tuple[int, int, Batch | Transfer]] = []  # when it ends, number, what
        now = number = 0
        while True:
            for item, end in self._begin(now):
                number += 1
                heappush(events, (end, number, item))
            if not events:
                return
            now = events[0][0]
            while events and events[0][0] == now:
                self._end(heappop(events)[2])

    def _begin(self, now: int) -> Iterator[tuple[Batch | Transfer, int]]:
        """Everything that can begin at time `now`."""
        for rank, left in enumerate(self.left):
            tiles = () if rank in self.busy else next_batch(self.problem, rank, left, self.present[rank], self.grain)
            if tiles:
                batch = Batch(now, rank, tiles)
                left.difference_update(tiles)
                self.busy.add(rank)
                self.batches.append(batch)
                yield batch, now + sum(self.problem.area[tile] for tile in tiles) * self.per_pair
        while (transfer := self._next_transfer(now)) is not None:
            line = self.lines[transfer.line]
            end = now + (line.bytes_back if transfer.returning else line.bytes_in) * self.per_byte
            for resource in self._route(transfer.line, transfer.rank, transfer.returning):
                self.free[resource] = end
            self.transfers.append(transfer)
            yield transfer, end

    def _end(self, item: Batch | Transfer) -> None:
        if isinstance(item, Transfer):
            if not item.returning:
                self.present[item.rank].add(item.line)
            return
        self.busy.remove(item.rank)
        for tile in item.tiles:
            for line in self.problem.sides[tile]:
                share = self.share.get((line, item.rank))
                if share is not None:
                    share.remove(tile)
                    if not share:
                        self.finished.append((line, item.rank))

    def _route(self, line: int, rank: int, returning: bool) -> tuple[Resource, ...]:
        owner = self.lines[line].owner
        return self.problem.route(rank, owner) if returning else self.problem.route(owner, rank)

    def _next_transfer(self, now: int) -> Transfer | None:
        """The most urgent transfer whose route is free."""

        def free(line: int, rank: int, returning: bool) -> bool:
            return all(self.free.get(resource, 0) <= now for resource in self._route(line, rank, returning))

        open_to = [rank for rank, unsent in enumerate(self.unsent) if any(free(n, rank, False) for n in unsent)]
        for queued, rank in sorted((self._queued_work(rank), rank) for rank in open_to):
            if queued < self.window:
                line = min((n for n in self.unsent[rank] if free(n, rank, False)), key=lambda n: self._priority(n, rank))
                self.unsent[rank].remove(line)
                self.incoming[rank].add(line)
                return Transfer(now, line, rank, False)
        for n, (line, rank) in enumerate(self.finished):
            if free(line, rank, True):
                del self.finished[n]
                return Transfer(now, line, rank, True)
        return None

    def _queued_work(self, rank: int) -> int:
        """Work on foreign blocks that `rank` has or is being sent."""
        incoming, left = self.incoming[rank], self.left[rank]
        return sum(
            self.problem.area[tile] for tile in left if ready(self.problem, tile, incoming) and self._foreign(tile, rank)
        )

    def _priority(self, line: int, rank: int) -> tuple[float, float, int, int]:
        """Sort key; least for the block that enables most work for its bytes. For ties, ranks begin with different owners."""
        nbytes = max(1, self.lines[line].bytes_in)
        tiles = self.lines[line].tiles
        area, left, incoming = self.problem.area, self.left[rank], self.incoming[rank] | {line}
        enabled = sum(area[tile] for tile in tiles if tile in left and ready(self.problem, tile, incoming))
        total = sum(area[tile] for tile in tiles if tile in left)
        return -enabled / nbytes, -total / nbytes, (rank - self.lines[line].owner) % self.problem.world, line

    def _foreign(self, tile: int, rank: int) -> bool:
        return any(self.lines[line].owner != rank for line in self.problem.sides[tile])


AHEAD = 2  # steps that an input leaves before the timeline sends it
LOOKAHEAD = {"total": 8, "port": 8, "link": 16}  # with a link for every pair of ranks, many are in use, and each is slow
RESULT = {Kind.Q: Kind.Q_ACC, Kind.KV: Kind.KV_ACC}


def schedule_of(problem: Problem, assignment: Assignment, *, lookahead: int | None = None) -> Schedule:
    """`assignment` as a schedule. More `lookahead` keeps more messages in flight and more buffers in use."""
    lookahead = LOOKAHEAD[problem.objective] if lookahead is None else lookahead
    if lookahead < 1:
        raise PlanError(f"lookahead={lookahead}; must be 1 or more: more keeps more links busy and more buffers in use")
    timeline = Timeline(problem, problem.ranks(assignment), lookahead)
    when = _steps(problem, timeline)
    tiles, read = [], defaultdict(list)
    for step, batch in zip(when, timeline.batches, strict=True):
        for tile in batch.tiles:
            tiles.append(Tile(step, batch.rank, *problem.tiles[tile]))
            for line in problem.sides[tile]:
                read[line, batch.rank].append(step)
    end = max(when, default=0) + 2
    moves = [
        _result(problem, transfer, read[transfer.line, transfer.rank], lookahead, end)
        if transfer.returning
        else _input(problem, transfer, read[transfer.line, transfer.rank], lookahead, transfer.start // timeline.step)
        for transfer in timeline.transfers
    ]
    owners = tuple(problem.q_owner), tuple(problem.kv_owner)
    schedule = make(f"balanced_{problem.objective}", problem.world, tiles, moves, BufferLimits(), owners)
    return replace(schedule, limits=peak(schedule))


def _steps(problem: Problem, timeline: Timeline) -> list[int]:
    """The step of every batch. A batch that reads a foreign block cannot be in the first."""
    reached, steps = [0] * problem.world, []
    for batch in timeline.batches:
        foreign = any(problem.lines[line].owner != batch.rank for tile in batch.tiles for line in problem.sides[tile])
        reached[batch.rank] = max(reached[batch.rank], batch.start // timeline.step, int(foreign))
        steps.append(reached[batch.rank])
    return steps


def _input(problem: Problem, transfer: Transfer, read: list[int], lookahead: int, planned: int) -> Move:
    line, arrival = problem.lines[transfer.line], min(read)
    depart = max(0, arrival - lookahead, min(planned - AHEAD, arrival - 1))
    return Move(line.kind, line.index, line.owner, transfer.rank, depart, arrival)


def _result(problem: Problem, transfer: Transfer, read: list[int], lookahead: int, end: int) -> Move:
    line, depart = problem.lines[transfer.line], max(read) + 1
    return Move(RESULT[line.kind], line.index, transfer.rank, line.owner, depart, min(depart + lookahead, end))
