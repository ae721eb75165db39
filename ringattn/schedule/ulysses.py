"""Builds Ulysses as a schedule: ranks of a group exchange sequence for heads, with one head group for every member.

    u = 4, the head group of member 2       ranks 0, 1, 3 send their rows of these heads to rank 2, their resident rank;
                                            rank 2 computes every tile; results return to the ranks that own the rows

With a head group for every member all ranks send to all: the all-to-all of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509).
As moves it needs no collective, no divisible lengths and no wait for the last byte: the first tiles start on what has arrived.
Inputs stay where they were sent, so that backward receives only dout and row statistics, and sends only gradients.

Around an inner schedule for world / u ranks it is USP (https://arxiv.org/abs/2405.07719), with a mesh or TokenRing inside as
well as a ring. Members of a group are neighbours: rank = inner rank * u + member. `resharded` builds the head group of one
member; `later` delays another share of heads, so that its exchange overlaps with the compute of the one before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from ringattn._validation import as_int, count, instance, short_repr
from ringattn.errors import PlanError
from ringattn.schedule.check import peak
from ringattn.schedule.ir import A_SCHEDULE, MOST_RANKS, BufferLimits, Kind, Move, Schedule, Tile, make


def ulysses(inner: Schedule, degree: int, *, stages: int = 0, groups: int = 1) -> tuple[Schedule, ...]:
    """`inner` for every member of a group of `degree` ranks: degree * groups schedules, each for its own share of the heads.

    Args:
        inner: schedule for world / degree ranks.
        degree: ranks in a group.
        stages: in how many portions the rows of the other members are received while tiles on earlier portions are computed;
            with 0 the first tile waits for all rows, as after a collective, and all are computed at once.
        groups: into how many shares the heads of a member are cut, which follow one another. The schedules of the first share
            come first.

    Raises:
        PlanError: an argument is out of range, or `inner` is resharded already.
    """
    instance("inner", inner, Schedule, PlanError, A_SCHEDULE)
    degree = count("degree", degree, PlanError, most=MOST_RANKS // inner.world)
    groups, stages = count("groups", groups, PlanError, most=MOST_RANKS), as_int("stages", stages, PlanError)
    if degree == 1 and groups == 1:
        return (inner,)
    first = resharded(inner, degree, 0, stages=stages)
    members = [first, *(_resharded(inner, degree, m, stages, first.limits) for m in range(1, degree))]
    steps = max((tile.step for tile in first.tiles), default=0) + 1
    head_groups = list(members)
    for n in range(1, groups):
        limits = later(first, n * steps).limits
        head_groups += [_later(head_group, n * steps, limits) for head_group in members]
    return tuple(head_groups)


def resharded(inner: Schedule, degree: int, member: int, *, stages: int = 0) -> Schedule:
    """`inner`, for world / degree ranks, on the ranks with number `member` in their group, with the rows of the whole group."""
    instance("inner", inner, Schedule, PlanError, A_SCHEDULE)
    arguments = (("degree", degree), ("member", member), ("stages", stages))
    degree, member, stages = (as_int(name, value, PlanError) for name, value in arguments)
    if not 1 <= degree <= MOST_RANKS // inner.world or not 0 <= member < degree or not 0 <= stages <= MOST_RANKS:
        call_text = f"resharded(degree={short_repr(degree)}, member={short_repr(member)}, stages={short_repr(stages)})"
        raise PlanError(f"{call_text}: member must be one of the group, stages 0 or more, and ranks {MOST_RANKS} at most")
    if inner.has_residents:
        raise PlanError(f"{inner.name} is resharded already; reshard once, with the product of both degrees")
    head_group = _resharded(inner, degree, member, stages, BufferLimits())
    return replace(head_group, limits=peak(head_group))


def _resharded(inner: Schedule, degree: int, member: int, stages: int, limits: BufferLimits) -> Schedule:
    head_group = _HeadGroup(inner, degree, member, stages)
    parts = head_group.owners(inner.q_owner), head_group.owners(inner.kv_owner)
    residents = head_group.residents(inner.q_owner), head_group.residents(inner.kv_owner)
    moves = [*head_group.inputs(), *head_group.within(), *head_group.results()]
    name = f"ulysses {member} of {degree}" + (f", {inner.name}" if inner.world > 1 else "")
    return make(name, inner.world * degree, head_group.tiles(), moves, limits, parts, residents)


def later(schedule: Schedule, steps: int) -> Schedule:
    """`schedule` delayed by `steps`, except that inputs leave for their resident ranks when the share before has begun."""
    delayed = _later(schedule, steps, BufferLimits())
    return replace(delayed, limits=peak(delayed))


def _later(schedule: Schedule, steps: int, limits: BufferLimits) -> Schedule:
    early = max((tile.step for tile in schedule.tiles), default=0) + 1
    tiles = tuple(tile._replace(step=tile.step + steps) for tile in schedule.tiles)
    moves = [
        move._replace(
            depart=move.depart + steps - (early if schedule.moves_to_resident(move) else 0), arrival=move.arrival + steps
        )
        for move in schedule.moves
    ]
    return replace(
        schedule, tiles=tiles, moves=tuple(sorted(moves, key=lambda move: (move.depart, move.arrival))), limits=limits
    )


class _HeadGroup:
    """Expands each block n of the inner schedule into `degree` blocks: block n * degree + m has the rows of member m."""

    def __init__(self, inner: Schedule, degree: int, member: int, stages: int) -> None:
        self.inner, self.degree, self.member, self.stages = inner, degree, member, stages

    def owners(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rank * self.degree + m for rank in inner for m in range(self.degree))

    def residents(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.rank(rank) for rank in inner for _ in range(self.degree))

    def rank(self, inner: int) -> int:
        return inner * self.degree + self.member

    def parts(self, index: int) -> Iterator[tuple[int, int]]:
        """Member and index of each block that block `index` of the inner schedule is expanded to."""
        return ((m, index * self.degree + m) for m in range(self.degree))

    def stage(self, m: int) -> int:
        """The step in which the rows of member `m` have arrived: own rows at once, the others by their distance."""
        distance = (m - self.member) % self.degree
        return 1 + (distance - 1) * self.stages // (self.degree - 1) if distance else 0

    def tiles(self) -> Iterator[Tile]:
        """Tiles among the group's own blocks as these arrive, starting with the first; all others once every block has."""
        for step, rank, i, j in self.inner.tiles:
            own = self.inner.q_owner[i] == self.inner.kv_owner[j] == rank
            for m, q in self.parts(i):
                for n, kv in self.parts(j):
                    arrived = max(self.stage(m), self.stage(n)) if own and self.stages else self._all_arrived
                    yield Tile(arrived + step, self.rank(rank), q, kv)

    @property
    def _all_arrived(self) -> int:
        return max(1, self.stages) if self.degree > 1 else 0

    def inputs(self) -> Iterator[Move]:
        """Moves from the owners of the rows to the member that computes these heads."""
        needed = self._first_use()
        for kind, owners in ((Kind.Q, self.inner.q_owner), (Kind.KV, self.inner.kv_owner)):
            for index, owner in enumerate(owners):
                for m, block in self.parts(index):
                    if m != self.member:
                        arrival = self.stage(m) + needed.get((kind, index), 0)
                        yield Move(kind, block, owner * self.degree + m, self.rank(owner), 0, arrival)

    def _first_use(self) -> dict[tuple[Kind, int], int]:
        """The step of the inner schedule in which an input is first read or sent at its owner."""
        steps: dict[tuple[Kind, int], int] = {}
        reads = [(Kind.Q, t.i, t.rank, t.step) for t in self.inner.tiles] + [
            (Kind.KV, t.j, t.rank, t.step) for t in self.inner.tiles
        ]
        reads += [(m.kind, m.index, m.src, m.depart) for m in self.inner.moves if not m.kind.moved]
        for kind, index, rank, step in reads:
            if rank == self.inner.owner(kind, index):
                steps[kind, index] = min(step, steps.get((kind, index), step))
        return steps

    def within(self) -> Iterator[Move]:
        """The moves of the inner schedule; what leaves its owner in step 0 there leaves here as soon as it has arrived."""
        for move in self.inner.moves:
            at_once = move.depart == 0 and not move.kind.moved and move.src == self.inner.owner(move.kind, move.index)
            for m, block in self.parts(move.index):
                depart = self.stage(m) if at_once else self._all_arrived + move.depart
                yield Move(move.kind, block, self.rank(move.src), self.rank(move.dst), depart, self._all_arrived + move.arrival)

    def results(self) -> Iterator[Move]:
        """Moves back to the owners of the rows, each as soon as its last share has arrived."""
        complete: dict[tuple[Kind, int], int] = defaultdict(int)
        for move in self.inner.moves:
            if move.kind.moved and move.dst == self.inner.owner(move.kind, move.index):
                key = move.kind, move.index
                complete[key] = max(complete[key], self._all_arrived + move.arrival)
        for tile in self.inner.tiles:
            for kind, index in ((Kind.Q_ACC, tile.i), (Kind.KV_ACC, tile.j)):
                if tile.rank == self.inner.owner(kind, index):
                    complete[kind, index] = max(complete[kind, index], self._all_arrived + tile.step + 1)
        for (kind, index), step in complete.items():
            owner = self.inner.owner(kind, index)
            for m, block in self.parts(index):
                if m != self.member:
                    yield Move(kind, block, self.rank(owner), owner * self.degree + m, step, step + self._all_arrived + 1)
