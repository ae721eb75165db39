"""Defines schedules as plain data: which rank computes which tile at which step, and what moves meanwhile.

Exactly four kinds of item exist:

    Q[i]       queries of block i       forward: q         backward: q, dout, lse, delta   read-only, copied
    KV[j]      keys, values of block j  k, v (, key_bias)  the same                        read-only, copied
    Q_ACC[i]   result for Q[i]          out, lse           dq                              moved, merged on arrival
    KV_ACC[j]  result for KV[j]         nothing            dk, dv (, dbias)                moved, merged on arrival

One definition serves both passes: forward ignores `KV_ACC`. Time is a sequence of steps. At the start of step t a rank first
receives the moves with arrival step t, then sends those that depart at t, then computes the tiles of step t. So a move that
departs at t and arrives at u overlaps with the tiles of steps t .. u - 1. Inputs are never written and accumulators are handed
over when they leave, so no buffer can change while it is in flight.

A rank's rows may be cut into several blocks: blocks with the same owner divide its rows evenly, in order. An input may have a
resident rank other than its owner; it then stays there from forward to backward. Ulysses uses nothing else (see `ulysses`).
This module does not run, prove, price or draw a schedule; each of those is a reader of this data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

from ringattn._validation import count, instance, short_repr, text
from ringattn.errors import ScheduleError

A_SCHEDULE = "pass a Schedule, such as ring(4)"
MOST_RANKS = 4096  # a schedule lists every tile; `ringattn.planner.closed_form` prices more ranks
MOST = 1 << 20  # steps and blocks: far more than any algorithm has, and few enough to list


class Kind(Enum):
    Q = "Q"
    KV = "KV"
    Q_ACC = "Q_ACC"
    KV_ACC = "KV_ACC"

    __hash__ = object.__hash__  # Enum's own hash is slow, and items and moves are hashed often

    def __init__(self, name: str) -> None:
        self.moved = name.endswith("ACC")  # accumulators are moved and merged; inputs are copied
        self.of_queries = name.startswith("Q")

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ScheduleError(f"kind={short_repr(value)}; choose one of {', '.join(kind.value for kind in cls)}")


class Tile(NamedTuple):
    """`rank` computes query block i against key block j during `step`."""

    step: int
    rank: int
    i: int
    j: int


class Move(NamedTuple):
    """`kind[index]` leaves `src` at the start of step `depart` and is received by `dst` at the start of step `arrival`."""

    kind: Kind
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used here
    src: int
    dst: int
    depart: int
    arrival: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}:{self.src}>{self.dst}@{self.arrival}"


class BufferLimits(NamedTuple):
    """How many blocks of each kind owned by other ranks one rank may hold at once, those in flight included."""

    q: int = 0
    kv: int = 0
    q_acc: int = 0
    kv_acc: int = 0


@dataclass(frozen=True)
class Schedule:
    """Tiles and moves in order, and the buffer limits they keep.

    `q_owner[i]` and `kv_owner[j]` are the ranks that own query block i and key block j. `q_resident` and `kv_resident` are the
    ranks where these inputs stay between the passes, one for each block, or empty when every input stays with its owner.
    `check` rejects a schedule that needs more buffers than `limits`. Moves are in one global order; every rank derives its
    sends and receives from it, so both ends of a link agree without tags.
    """

    name: str
    world: int
    q_owner: tuple[int, ...]
    kv_owner: tuple[int, ...]
    tiles: tuple[Tile, ...]
    moves: tuple[Move, ...]
    limits: BufferLimits
    q_resident: tuple[int, ...] = ()
    kv_resident: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks types and ranges. Whether the schedule is a correct algorithm is decided by `check`."""
        text("name of a schedule", self.name, ScheduleError)
        about = f"schedule {self.name!r}: "
        count(f"{about}world", self.world, ScheduleError, most=MOST_RANKS)
        for name in ("q_owner", "kv_owner", "q_resident", "kv_resident"):
            ranks = getattr(self, name)
            if not isinstance(ranks, tuple) or not _are_numbers([ranks], self.world):
                raise ScheduleError(f"{about}{name}={short_repr(ranks)}; must be a tuple of ranks below world={self.world}")
        if not isinstance(self.limits, BufferLimits) or not _are_numbers([self.limits], MOST):
            raise ScheduleError(
                f"{about}limits={short_repr(self.limits)}; must be a BufferLimits(q, kv, q_acc, kv_acc) of numbers of blocks"
            )
        for kind, (residents, owners) in {
            "q": (self.q_resident, self.q_owner),
            "kv": (self.kv_resident, self.kv_owner),
        }.items():
            if len(residents) not in (0, len(owners)):
                raise ScheduleError(
                    f"{about}{kind}_resident has {len(residents)} ranks and {kind}_owner {len(owners)}; pass as many, or none"
                )
        self._check_tiles(about)
        self._check_moves(about)

    def _check_tiles(self, about: str) -> None:
        """Checks whole columns at once: there may be millions of tiles."""
        must = f"must be a tuple of Tile(step, rank, i, j) of whole numbers up to {MOST:,}, none before the first step"
        steps, ranks, i, j = _columns(f"{about}tiles", self.tiles, Tile, ScheduleError, must)
        if not (
            _are_numbers([steps, ranks], MOST)
            and _are_numbers([i], len(self.q_owner))
            and _are_numbers([j], len(self.kv_owner))
        ):
            raise ScheduleError(f"{about}tiles={short_repr(self.tiles)}; {must}, of blocks that have an owner")

    def _check_moves(self, about: str) -> None:
        must = (
            f"must be a tuple of Move(kind, index, src, dst, depart, arrival) of a Kind and whole numbers up to {MOST:,}, "
            "none before the first step"
        )
        kinds, indices, *others = _columns(f"{about}moves", self.moves, Move, ScheduleError, must)
        if not (set(map(type, kinds)) <= {Kind} and _are_numbers([indices, *others], MOST)):
            raise ScheduleError(f"{about}moves={short_repr(self.moves)}; {must}")
        for move in self.moves:
            self.owner(move.kind, move.index)

    @cached_property
    def steps(self) -> int:
        """Number of steps; in the last one a rank may only receive."""
        return max([t.step for t in self.tiles] + [m.arrival for m in self.moves], default=0) + 1

    def owner(self, kind: Kind, index: int) -> int:
        try:
            return (self.q_owner if kind.of_queries else self.kv_owner)[index]
        except Exception:
            raise self._no_block(kind, index) from None

    def resident_rank(self, kind: Kind, index: int) -> int:
        """The rank where an input stays between forward and backward."""
        try:
            residents = (self.q_resident or self.q_owner) if kind.of_queries else (self.kv_resident or self.kv_owner)
            return residents[index]
        except Exception:
            raise self._no_block(kind, index) from None

    def _no_block(self, kind: object, index: object) -> ScheduleError:
        blocks = f"{len(self.q_owner)} blocks of queries and {len(self.kv_owner)} of keys"
        return ScheduleError(
            f"schedule {self.name!r}: kind={short_repr(kind)}, index={short_repr(index)}; there are {blocks}: "
            "pass a Kind and a number"
        )

    @property
    def has_residents(self) -> bool:
        """Whether any input stays at another rank than its owner between the passes."""
        return bool(self.q_resident or self.kv_resident)

    def moves_to_resident(self, move: Move) -> bool:
        """Whether `move` takes an input from its owner to its resident rank."""
        instance("move", move, Move, ScheduleError, "pass a Move(kind, index, src, dst, depart, arrival)")
        from_owner = move.src == self.owner(move.kind, move.index)
        return not move.kind.moved and from_owner and move.dst == self.resident_rank(move.kind, move.index)

    def returns_to_owner(self, kind: Kind) -> bool:
        """Whether every partial result of `kind` goes straight to the resident rank, and so is rounded at most once.

        A complete result that moves on from there to its owner is not rounded a second time.
        """
        return instance("kind", kind, Kind, ScheduleError, "pass a Kind") not in self._accumulated_kinds

    @cached_property
    def _accumulated_kinds(self) -> frozenset[Kind]:
        accumulator_moves = [m for m in self.moves if m.kind.moved]
        return frozenset(
            m.kind for m in accumulator_moves if m.dst != self.resident_rank(m.kind, m.index) and not self._last_leg(m)
        )

    def _last_leg(self, move: Move) -> bool:
        return (move.src, move.dst) == (self.resident_rank(move.kind, move.index), self.owner(move.kind, move.index))

    @cached_property
    def digest(self) -> str:
        return sha256(str(self).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        """One line per step; `parse` reads it back.

        This text is a pinned format: digests and stored schedules depend on it. Its keys keep their names: q_home and kv_home
        are the owners, room the limits, q_rest and kv_rest the resident ranks.
        """
        owners = f"q_home={_csv(self.q_owner)} kv_home={_csv(self.kv_owner)} room={_csv(self.limits)}"
        if self.has_residents:
            owners += f" q_rest={_csv(self.q_resident)} kv_rest={_csv(self.kv_resident)}"
        tiles: list[list[str]] = [[] for _ in range(self.steps)]
        moves: list[list[str]] = [[] for _ in range(self.steps)]
        for t in self.tiles:
            tiles[t.step].append(f"r{t.rank}({t.i},{t.j})")
        for m in self.moves:
            moves[m.depart].append(str(m))
        lines = [f"{step} | {' '.join(tiles[step])} | {' '.join(moves[step])}" for step in range(self.steps)]
        return "\n".join([f"{self.name} world={self.world} {owners}", *lines])


def make(
    name: str,
    world: int,
    tiles: Iterable[Tile],
    moves: Iterable[Move],
    limits: BufferLimits,
    owners: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    residents: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Schedule:
    """Builds a schedule in canonical order: by step, then arrival step, then as passed. By default rank n owns block n."""
    world = count("world", world, ScheduleError, most=MOST_RANKS)
    q_owner, kv_owner = _pair("owners", owners) if owners is not None else (tuple(range(world)), tuple(range(world)))
    schedule = Schedule(
        name,
        world,
        q_owner,
        kv_owner,
        _as_tuple("tiles", tiles),
        _as_tuple("moves", moves),
        limits,
        *_pair("residents", residents),
    )
    ordered_moves = tuple(
        sorted(schedule.moves, key=lambda m: (m.depart, m.arrival))
    )  # what is needed sooner is sent first on a link
    ordered_tiles = tuple(sorted(schedule.tiles, key=lambda t: t.step))
    return replace(schedule, tiles=ordered_tiles, moves=ordered_moves)


def parse(text: str) -> Schedule:
    """The schedule that prints as `text`. Raises `ScheduleError` for any other text."""
    head, *lines = instance(
        "text", text, str, ScheduleError, "pass the text of a schedule, as str(schedule) returns it"
    ).strip().splitlines() or [""]
    # The keys of this line are part of the pinned text format, see `Schedule.__str__`.
    residents_pattern = r"(?: q_rest=([\d,]*) kv_rest=([\d,]*))?"
    match = re.fullmatch(r"(.+) world=(\d+) q_home=([\d,]*) kv_home=([\d,]*) room=([\d,]*)" + residents_pattern, head)
    if match is None:
        raise ScheduleError(
            f"not a schedule: {short_repr(head)}; the first line reads 'NAME world=.. q_home=.. kv_home=.. room=..'"
        )
    try:
        return _parse_steps(lines, *match.groups(default=""))
    except (ValueError, TypeError) as error:  # ScheduleError is a ValueError too
        raise ScheduleError(f"not a schedule: {error}; lines read 'STEP | rRANK(I,J) .. | KINDn:SRC>DST@DUE ..'") from error


def _parse_steps(
    lines: Iterable[str], name: str, world: str, q_owner: str, kv_owner: str, limits: str, q_resident: str, kv_resident: str
) -> Schedule:
    tiles, moves = [], []
    for line in lines:
        step, tile_text, move_text = (part.strip() for part in line.split("|"))
        for rank, i, j in re.findall(r"r(\d+)\((\d+),(\d+)\)", tile_text):
            tiles.append(Tile(int(step), int(rank), int(i), int(j)))
        for kind, index, src, dst, arrival in re.findall(r"([A-Za-z_]+)(\d+):(\d+)>(\d+)@(\d+)", move_text):
            moves.append(Move(Kind(kind), int(index), int(src), int(dst), int(step), int(arrival)))
    owners, residents = (_ints(q_owner), _ints(kv_owner)), (_ints(q_resident), _ints(kv_resident))
    return make(name, int(world), tiles, moves, BufferLimits(*_ints(limits)), owners, residents)


def _as_tuple(name: str, things: Any) -> tuple[Any, ...]:
    try:
        return tuple(things)
    except Exception:
        raise ScheduleError(f"{name}={short_repr(things)}; must be a list or tuple of them") from None


def _pair(name: str, pair: Any) -> tuple[Any, Any]:
    """Checks a pair of tuples: one for blocks of queries, one for blocks of keys."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ScheduleError(f"{name}={short_repr(pair)}; must be two tuples of ranks, for blocks of queries and blocks of keys")
    return pair


def _columns(
    name: str, things: Any, kind: type[NamedTuple], error: type[ScheduleError], must: str
) -> Collection[tuple[Any, ...]]:
    """The fields of a tuple of `kind`, as one column of values for each field."""
    if not isinstance(things, tuple) or not set(map(type, things)) <= {kind}:
        raise error(f"{name}={short_repr(things)}; {must}")
    return list(zip(*things, strict=True)) or [()] * len(kind._fields)


def _are_numbers(columns: Iterable[tuple[Any, ...]], stop: int) -> bool:
    """Whether all values are integers in [0, stop)."""
    return all(
        all(issubclass(kind, int) for kind in set(map(type, column))) and (not column or 0 <= min(column) <= max(column) < stop)
        for column in columns
    )


def _csv(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
