"""Who computes and sends what, when: a play of all ranks on a clock, for an assignment that is given.

Nothing is known here of real machines, so the clock is the tightest one that lets everything be hidden: in the time in which
the rank with most work computes, the busiest port (or link) just carries its bytes. Whatever is free takes what is most urgent:

    a port    the block for the rank that will first run out of work on foreign blocks, and for that rank the one that opens
              most work for its bytes; results fill the gaps. No rank is sent more than a window of work ahead
    a rank    what `batches` says

What comes out is only an order and a rhythm; `steps` makes a schedule of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from ringattn.schedule.balanced.batches import next_batch, ready
from ringattn.schedule.balanced.problem import Problem, Resource, measure, visits

GRAINS = 12  # of them make up the work of the busiest rank, unless its tiles are larger


class Batch(NamedTuple):
    """Tiles that `rank` computes in one go."""

    start: int
    rank: int
    tiles: tuple[int, ...]


class Transfer(NamedTuple):
    """A block's inputs to a rank that it visits, or the result of the visit back home."""

    start: int
    line: int
    rank: int
    home: bool


class Timeline:
    """All ranks of one assignment on one clock: `batches` and `transfers` in the order in which they begin."""

    def __init__(self, problem: Problem, ranks: Sequence[int], window: int) -> None:
        self.problem, self.lines = problem, problem.lines
        met = measure(problem, dict(zip(problem.tiles, ranks, strict=True)))
        # A pair takes `per_pair`, a byte `per_byte`: then the busiest rank and the busiest resource take equally long.
        self.per_byte, self.per_pair = max(1, met.load), max(1, met.link if problem.objective == "link" else met.port)
        self.grain = max(met.load // GRAINS, *problem.area, 1)  # the most work of a batch
        self.step = max(1, self.grain * self.per_pair // 2)
        self.window = max(1, window * self.grain // 2)
        world = range(problem.world)
        self.left: list[set[int]] = [set() for _ in world]  # tiles not begun
        for tile, rank in enumerate(ranks):
            self.left[rank].add(tile)
        own = [{n for n, line in enumerate(self.lines) if line.home == rank} for rank in world]
        self.here, self.coming = own, [set(lines) for lines in own]  # blocks at each rank, and those on their way there too
        self.wanted: list[set[int]] = [set() for _ in world]
        self.share: dict[tuple[int, int], set[int]] = {}  # tiles not finished of each visit
        for n, rank in visits(problem, ranks):
            self.wanted[rank].add(n)
            self.share[n, rank] = {tile for tile in self.lines[n].tiles if ranks[tile] == rank}
        self.finished: list[tuple[int, int]] = []
        self.busy: set[int] = set()
        self.free: dict[Resource, int] = {}
        self.batches: list[Batch] = []
        self.transfers: list[Transfer] = []
        self._play()

    def _play(self) -> None:
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
        """Everything that can begin at this moment."""
        for rank, left in enumerate(self.left):
            tiles = () if rank in self.busy else next_batch(self.problem, rank, left, self.here[rank], self.grain)
            if tiles:
                batch = Batch(now, rank, tiles)
                left.difference_update(tiles)
                self.busy.add(rank)
                self.batches.append(batch)
                yield batch, now + sum(self.problem.area[tile] for tile in tiles) * self.per_pair
        while (transfer := self._next_transfer(now)) is not None:
            line = self.lines[transfer.line]
            end = now + (line.bytes_home if transfer.home else line.bytes_in) * self.per_byte
            for resource in self._route(transfer.line, transfer.rank, transfer.home):
                self.free[resource] = end
            self.transfers.append(transfer)
            yield transfer, end

    def _end(self, item: Batch | Transfer) -> None:
        if isinstance(item, Transfer):
            if not item.home:
                self.here[item.rank].add(item.line)
            return
        self.busy.remove(item.rank)
        for tile in item.tiles:
            for line in self.problem.sides[tile]:
                share = self.share.get((line, item.rank))
                if share is not None:
                    share.remove(tile)
                    if not share:
                        self.finished.append((line, item.rank))

    def _route(self, line: int, rank: int, home: bool) -> tuple[Resource, ...]:
        owner = self.lines[line].home
        return self.problem.route(rank, owner) if home else self.problem.route(owner, rank)

    def _next_transfer(self, now: int) -> Transfer | None:
        """The most urgent of those whose way is free."""

        def free(line: int, rank: int, home: bool) -> bool:
            return all(self.free.get(resource, 0) <= now for resource in self._route(line, rank, home))

        open_to = [rank for rank, wanted in enumerate(self.wanted) if any(free(n, rank, False) for n in wanted)]
        for stock, rank in sorted((self._stock(rank), rank) for rank in open_to):
            if stock < self.window:
                line = min((n for n in self.wanted[rank] if free(n, rank, False)), key=lambda n: self._reluctance(n, rank))
                self.wanted[rank].remove(line)
                self.coming[rank].add(line)
                return Transfer(now, line, rank, False)
        for n, (line, rank) in enumerate(self.finished):
            if free(line, rank, True):
                del self.finished[n]
                return Transfer(now, line, rank, True)
        return None

    def _stock(self, rank: int) -> int:
        """Work on foreign blocks that `rank` has or is about to have."""
        coming, left = self.coming[rank], self.left[rank]
        return sum(self.problem.area[tile] for tile in left if ready(self.problem, tile, coming) and self._foreign(tile, rank))

    def _reluctance(self, line: int, rank: int) -> tuple[float, float, int, int]:
        """Least for the block that opens most work for its bytes; among equals, ranks begin with different owners."""
        nbytes = max(1, self.lines[line].bytes_in)
        tiles = self.lines[line].tiles
        area, left, coming = self.problem.area, self.left[rank], self.coming[rank] | {line}
        opened = sum(area[tile] for tile in tiles if tile in left and ready(self.problem, tile, coming))
        total = sum(area[tile] for tile in tiles if tile in left)
        return -opened / nbytes, -total / nbytes, (rank - self.lines[line].home) % self.problem.world, line

    def _foreign(self, tile: int, rank: int) -> bool:
        return any(self.lines[line].home != rank for line in self.problem.sides[tile])
