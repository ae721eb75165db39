"""Ulysses: ranks of a group trade sequence for heads. Here it is a schedule like any other, a lane for every share of heads.

    u = 4, one lane (that of member 2)      rank 0, 1, 3 send their rows of the lane's heads to rank 2, where they rest;
                                            rank 2 computes every tile; results go back to the ranks that own the rows

With a lane for every member all ranks send to all: the all-to-all of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). Said
as moves it needs no collective, no divisible lengths and no wait for the last byte: the first tiles start on what has arrived.
Inputs rest where they were sent, so that backward moves only dout and row statistics in, and gradients out.

Around an inner schedule for world / u ranks it is USP (https://arxiv.org/abs/2405.07719), with a mesh or TokenRing inside as
well as a ring. Members of a group are neighbours: rank = inner rank * u + member. `resharded` makes the lane of one member,
`later` lets another share of heads follow behind, so that its exchange travels beside the compute of the one before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from ringattn._validation import count, instance, shown, whole
from ringattn.errors import PlanError
from ringattn.schedule.check import peak
from ringattn.schedule.ir import A_SCHEDULE, MOST_RANKS, Kind, Move, Room, Schedule, Tile, make


def ulysses(inner: Schedule, degree: int, *, stages: int = 0, groups: int = 1) -> tuple[Schedule, ...]:
    """`inner` for every member of every group of `degree` ranks: degree * groups lanes, each for its own share of the heads.

    `stages`: in how many portions the rows of the other members are taken in, while there is work on what has arrived; with 0
    the first tile waits for all of them, as after a collective, and all are computed at once. `groups`: how many shares of a
    member's heads follow one another. Lanes of the first share stand first.
    """
    instance("inner", inner, Schedule, PlanError, A_SCHEDULE)
    degree = count("degree", degree, PlanError, most=MOST_RANKS // inner.world)
    groups, stages = count("groups", groups, PlanError, most=MOST_RANKS), whole("stages", stages, PlanError)
    if degree == 1 and groups == 1:
        return (inner,)
    first = resharded(inner, degree, 0, stages=stages)
    members = [first, *(_resharded(inner, degree, m, stages, first.room) for m in range(1, degree))]
    steps = max((tile.step for tile in first.tiles), default=0) + 1
    lanes = list(members)
    for n in range(1, groups):
        room = later(first, n * steps).room
        lanes += [_later(lane, n * steps, room) for lane in members]
    return tuple(lanes)


def resharded(inner: Schedule, degree: int, member: int, *, stages: int = 0) -> Schedule:
    """`inner`, for world / degree ranks, on the ranks that are `member` of their group, with rows from all of the group."""
    instance("inner", inner, Schedule, PlanError, A_SCHEDULE)
    named = (("degree", degree), ("member", member), ("stages", stages))
    degree, member, stages = (whole(name, value, PlanError) for name, value in named)
    if not 1 <= degree <= MOST_RANKS // inner.world or not 0 <= member < degree or not 0 <= stages <= MOST_RANKS:
        said = f"resharded(degree={shown(degree)}, member={shown(member)}, stages={shown(stages)})"
        raise PlanError(f"{said}: one of the group, and 0 stages or more, of {MOST_RANKS} ranks at most")
    if inner.resting:
        raise PlanError(f"{inner.name} is resharded already; reshard once, with the product of both degrees")
    lane = _resharded(inner, degree, member, stages, Room())
    return replace(lane, room=peak(lane))


def _resharded(inner: Schedule, degree: int, member: int, stages: int, room: Room) -> Schedule:
    lane = _Lane(inner, degree, member, stages)
    parts = lane.homes(inner.q_home), lane.homes(inner.kv_home)
    rests = lane.rests(inner.q_home), lane.rests(inner.kv_home)
    moves = [*lane.inputs(), *lane.within(), *lane.results()]
    name = f"ulysses {member} of {degree}" + (f", {inner.name}" if inner.world > 1 else "")
    return make(name, inner.world * degree, lane.tiles(), moves, room, parts, rests)


def later(schedule: Schedule, steps: int) -> Schedule:
    """`schedule` begun `steps` later, except that inputs leave for where they rest when the share before has begun."""
    behind = _later(schedule, steps, Room())
    return replace(behind, room=peak(behind))


def _later(schedule: Schedule, steps: int, room: Room) -> Schedule:
    early = max((tile.step for tile in schedule.tiles), default=0) + 1
    tiles = tuple(tile._replace(step=tile.step + steps) for tile in schedule.tiles)
    moves = [
        move._replace(depart=move.depart + steps - (early if schedule.to_rest(move) else 0), due=move.due + steps)
        for move in schedule.moves
    ]
    return replace(schedule, tiles=tiles, moves=tuple(sorted(moves, key=lambda move: (move.depart, move.due))), room=room)


class _Lane:
    """Block n of the inner schedule becomes `degree` blocks, n * degree + m holding the rows of member m."""

    def __init__(self, inner: Schedule, degree: int, member: int, stages: int) -> None:
        self.inner, self.degree, self.member, self.stages = inner, degree, member, stages

    def homes(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rank * self.degree + m for rank in inner for m in range(self.degree))

    def rests(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.rank(rank) for rank in inner for _ in range(self.degree))

    def rank(self, inner: int) -> int:
        return inner * self.degree + self.member

    def parts(self, index: int) -> Iterator[tuple[int, int]]:
        """Member and number of each block that block `index` of the inner schedule has become."""
        return ((m, index * self.degree + m) for m in range(self.degree))

    def stage(self, m: int) -> int:
        """When the rows of member `m` are there: own rows at once, the others by their distance."""
        distance = (m - self.member) % self.degree
        return 1 + (distance - 1) * self.stages // (self.degree - 1) if distance else 0

    def tiles(self) -> Iterator[Tile]:
        """Tiles among blocks of one's own as they arrive, from the first on; all others when everything has."""
        for step, rank, i, j in self.inner.tiles:
            own = self.inner.q_home[i] == self.inner.kv_home[j] == rank
            for m, q in self.parts(i):
                for n, kv in self.parts(j):
                    arrived = max(self.stage(m), self.stage(n)) if own and self.stages else self._all_there
                    yield Tile(arrived + step, self.rank(rank), q, kv)

    @property
    def _all_there(self) -> int:
        return max(1, self.stages) if self.degree > 1 else 0

    def inputs(self) -> Iterator[Move]:
        """From the owners of the rows to the member that has these heads."""
        needed = self._first_use()
        for kind, homes in ((Kind.Q, self.inner.q_home), (Kind.KV, self.inner.kv_home)):
            for index, home in enumerate(homes):
                for m, block in self.parts(index):
                    if m != self.member:
                        due = self.stage(m) + needed.get((kind, index), 0)
                        yield Move(kind, block, home * self.degree + m, self.rank(home), 0, due)

    def _first_use(self) -> dict[tuple[Kind, int], int]:
        """The step of the inner schedule in which an input is first read or sent at its home."""
        steps: dict[tuple[Kind, int], int] = {}
        reads = [(Kind.Q, t.i, t.rank, t.step) for t in self.inner.tiles] + [
            (Kind.KV, t.j, t.rank, t.step) for t in self.inner.tiles
        ]
        reads += [(m.kind, m.index, m.src, m.depart) for m in self.inner.moves if not m.kind.moved]
        for kind, index, rank, step in reads:
            if rank == self.inner.home(kind, index):
                steps[kind, index] = min(step, steps.get((kind, index), step))
        return steps

    def within(self) -> Iterator[Move]:
        """The moves of the inner schedule; what leaves its home there at once leaves as soon as it has come."""
        for move in self.inner.moves:
            at_once = move.depart == 0 and not move.kind.moved and move.src == self.inner.home(move.kind, move.index)
            for m, block in self.parts(move.index):
                depart = self.stage(m) if at_once else self._all_there + move.depart
                yield Move(move.kind, block, self.rank(move.src), self.rank(move.dst), depart, self._all_there + move.due)

    def results(self) -> Iterator[Move]:
        """Back to the owners of the rows, each as soon as its last share is in."""
        complete: dict[tuple[Kind, int], int] = defaultdict(int)
        for move in self.inner.moves:
            if move.kind.moved and move.dst == self.inner.home(move.kind, move.index):
                key = move.kind, move.index
                complete[key] = max(complete[key], self._all_there + move.due)
        for tile in self.inner.tiles:
            for kind, index in ((Kind.Q_ACC, tile.i), (Kind.KV_ACC, tile.j)):
                if tile.rank == self.inner.home(kind, index):
                    complete[kind, index] = max(complete[kind, index], self._all_there + tile.step + 1)
        for (kind, index), step in complete.items():
            home = self.inner.home(kind, index)
            for m, block in self.parts(index):
                if m != self.member:
                    yield Move(kind, block, self.rank(home), home * self.degree + m, step, step + self._all_there + 1)
