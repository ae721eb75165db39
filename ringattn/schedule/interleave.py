"""Interleaves parts of a block with parts of other blocks, for schedules that send straight from owner to user.

    token_ring, direct, 4 ranks, rank 0, by step         parts one after another     parts of 3, 2 and 1 in turn
                                                         3a 3b 2a 2b 1a 1b           3a 2a 1a 3b 2b 1b

Where every pair of ranks has a link of its own, the first parts of all blocks arrive at once. `split` computes one block to the
end while the others have arrived, and waits for the link of that block; here the first part of each block is computed first,
while the second parts travel. The first results also leave sooner. As many bytes are in flight as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ringattn.errors import PlanError
from ringattn.schedule.check import peak
from ringattn.schedule.ir import Kind, Move, Schedule, Tile, make
from ringattn.schedule.transforms import parts_of


def take_turns(schedule: Schedule, *, q: int = 1, kv: int = 1) -> Schedule:
    """Cuts every block of queries into `q` parts or every block of keys into `kv`, and computes visitors' parts in turn.

    Step 0, own rows against own keys, stays one step.

    Raises:
        PlanError: blocks hop in this schedule, or both `q` and `kv` are more than 1.
    """
    q, kv = parts_of("take_turns", schedule, q, kv)
    if min(q, kv) != 1:
        raise PlanError(f"take_turns(q={q}, kv={kv}): cut queries or keys, into at least one part")
    if any(move.src != schedule.owner(move.kind, move.index) and not move.kind.moved for move in schedule.moves):
        raise PlanError(f"{schedule.name}: blocks that hop cannot take turns; use split, or routing='direct'")
    turns = _Turns(schedule, q, kv)
    owners = tuple(h for h in schedule.q_owner for _ in range(q)), tuple(h for h in schedule.kv_owner for _ in range(kv))
    name = f"{schedule.name}/{q}x{kv} in turn"
    interleaved = make(name, schedule.world, turns.tiles(), turns.moves(), schedule.limits, owners)
    return replace(interleaved, limits=peak(interleaved))


class _Turns:
    def __init__(self, schedule: Schedule, q: int, kv: int) -> None:
        self.schedule, self.q, self.kv = schedule, q, kv
        self.parts = q * kv
        self.round = max((tile.step for tile in schedule.tiles), default=0)  # steps in which each visitor has one turn
        self.end = self.parts * self.round + 2  # the step in which the last results arrive

    def step(self, step: int, part: int) -> int:
        """The new step of `part` of the tiles of old step `step`."""
        return part * self.round + step if step else 0

    def parts_of(self, kind: Kind) -> Iterator[tuple[int, int, int]]:
        """Number, first and last turn of each part of a block; a block that is not cut is used in all turns."""
        cut = self.q if kind.of_queries else self.kv
        return ((n, n, n) if cut > 1 else (0, 0, self.parts - 1) for n in range(cut))

    def tiles(self) -> Iterator[Tile]:
        for step, rank, i, j in self.schedule.tiles:
            for part in range(self.parts):
                yield Tile(self.step(step, part), rank, i * self.q + part % self.q, j * self.kv + part % self.kv)

    def moves(self) -> Iterator[Move]:
        for move in self.schedule.moves:
            for n, first, last in self.parts_of(move.kind):
                index = move.index * (self.q if move.kind.of_queries else self.kv) + n
                in_flight = (move.arrival - move.depart) * self.parts
                if move.kind.moved:
                    depart = self.step(move.depart - 1, last) + 1
                    yield move._replace(index=index, depart=depart, arrival=min(depart + in_flight, self.end))
                else:
                    arrival = self.step(move.arrival, first)
                    yield move._replace(index=index, depart=max(0, arrival - in_flight), arrival=arrival)
