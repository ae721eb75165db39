"""A schedule is plain data: which rank computes which tile at which step, and what travels meanwhile.

Four kinds of thing exist and no fifth:

    Q[i]       queries of block i       forward: q         backward: q, dout, lse, delta   read-only, copied
    KV[j]      keys, values of block j  k, v (, key_bias)  the same                        read-only, copied
    Q_ACC[i]   result for Q[i]          out, lse           dq                              moved, merged on arrival
    KV_ACC[j]  result for KV[j]         nothing            dk, dv (, dbias)                moved, merged on arrival

One definition serves both passes: forward ignores `KV_ACC`. Time is a row of steps. At the start of step t a rank takes in what
is due at t, then sends what departs at t (as it is at that moment), then computes the tiles of step t; so a move that departs
at t and is due at u travels beside the tiles of steps t .. u - 1. Inputs are never written and accumulators are given away when
they leave, so no buffer can change while it is in flight, by construction.

A rank's rows may be cut into several blocks: blocks that name the same home divide its rows evenly, in order. Inputs may `rest`
at another rank than home: there they stay from forward to backward, which is all that Ulysses is (see `ulysses`).
What this module does not do: run, prove, price or draw a schedule. Each of those is one reader of this data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

from ringattn._validation import count, instance, shown, text
from ringattn.errors import ScheduleError

A_SCHEDULE = "give a Schedule, as ring(4) makes one"
MOST_RANKS = 4096  # a schedule lists every tile; `ringattn.planner.closed_form` prices more ranks by closed form
MOST = 1 << 20  # steps and blocks: far more than any algorithm has, and few enough to go through one by one


class Kind(Enum):
    Q = "Q"
    KV = "KV"
    Q_ACC = "Q_ACC"
    KV_ACC = "KV_ACC"

    __hash__ = object.__hash__  # that of Enum is slow, and every item and move is hashed often

    def __init__(self, name: str) -> None:
        self.moved = name.endswith("ACC")  # accumulators are moved and merged; inputs are copied
        self.of_queries = name.startswith("Q")

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ScheduleError(f"kind={shown(value)}; choose one of {', '.join(kind.value for kind in cls)}")


class Tile(NamedTuple):
    """`rank` computes query block i against key block j during `step`."""

    step: int
    rank: int
    i: int
    j: int


class Move(NamedTuple):
    """`kind[index]` leaves `src` at the start of step `depart` and is taken in by `dst` at the start of step `due`."""

    kind: Kind
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    src: int
    dst: int
    depart: int
    due: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}:{self.src}>{self.dst}@{self.due}"


class Room(NamedTuple):
    """How many blocks of each kind that belong to other ranks a rank may hold at once, those in flight included."""

    q: int = 0
    kv: int = 0
    q_acc: int = 0
    kv_acc: int = 0


@dataclass(frozen=True)
class Schedule:
    """Tiles and moves in order, and the bounds they promise to keep.

    `q_home[i]` and `kv_home[j]` are the ranks that own query block i and key block j; `q_rest` and `kv_rest` those where their
    inputs stay between the passes, as many, or none when that is at home. `room` is the promise on buffers: `check` rejects a
    schedule that needs more. Moves are in one global order; every rank derives its sends and receives from it, so both ends
    of a link agree without tags.
    """

    name: str
    world: int
    q_home: tuple[int, ...]
    kv_home: tuple[int, ...]
    tiles: tuple[Tile, ...]
    moves: tuple[Move, ...]
    room: Room
    q_rest: tuple[int, ...] = ()
    kv_rest: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """It is made of what schedules are made of. Whether it is a correct algorithm, `check` says."""
        text("name of a schedule", self.name, ScheduleError)
        about = f"schedule {self.name!r}: "
        count(f"{about}world", self.world, ScheduleError, most=MOST_RANKS)
        for name in ("q_home", "kv_home", "q_rest", "kv_rest"):
            ranks = getattr(self, name)
            if not isinstance(ranks, tuple) or not _are_numbers([ranks], self.world):
                raise ScheduleError(f"{about}{name}={shown(ranks)}; must be a tuple of ranks below world={self.world}")
        if not isinstance(self.room, Room) or not _are_numbers([self.room], MOST):
            raise ScheduleError(f"{about}room={shown(self.room)}; must be a Room(q, kv, q_acc, kv_acc) of numbers of blocks")
        for kind, (rests, homes) in {"q": (self.q_rest, self.q_home), "kv": (self.kv_rest, self.kv_home)}.items():
            if len(rests) not in (0, len(homes)):
                raise ScheduleError(
                    f"{about}{kind}_rest has {len(rests)} ranks and {kind}_home {len(homes)}; give as many, or none"
                )
        self._check_tiles(about)
        self._check_moves(about)

    def _check_tiles(self, about: str) -> None:
        """Asked of whole columns: there may be millions."""
        must = f"must be a tuple of Tile(step, rank, i, j) of whole numbers up to {MOST:,}, none before the first step"
        steps, ranks, i, j = _columns(f"{about}tiles", self.tiles, Tile, ScheduleError, must)
        if not (
            _are_numbers([steps, ranks], MOST) and _are_numbers([i], len(self.q_home)) and _are_numbers([j], len(self.kv_home))
        ):
            raise ScheduleError(f"{about}tiles={shown(self.tiles)}; {must}, of blocks that have a home")

    def _check_moves(self, about: str) -> None:
        must = (
            f"must be a tuple of Move(kind, index, src, dst, depart, due) of a Kind and whole numbers up to {MOST:,}, "
            "none before the first step"
        )
        kinds, indices, *others = _columns(f"{about}moves", self.moves, Move, ScheduleError, must)
        if not (set(map(type, kinds)) <= {Kind} and _are_numbers([indices, *others], MOST)):
            raise ScheduleError(f"{about}moves={shown(self.moves)}; {must}")
        for move in self.moves:
            self.home(move.kind, move.index)

    @cached_property
    def steps(self) -> int:
        """One more than the last step in which anything happens; the last one may only take in what is due."""
        return max([t.step for t in self.tiles] + [m.due for m in self.moves], default=0) + 1

    def home(self, kind: Kind, index: int) -> int:
        try:
            return (self.q_home if kind.of_queries else self.kv_home)[index]
        except Exception:
            raise self._no_block(kind, index) from None

    def rest(self, kind: Kind, index: int) -> int:
        """Where an input stays between forward and backward."""
        try:
            rests = (self.q_rest or self.q_home) if kind.of_queries else (self.kv_rest or self.kv_home)
            return rests[index]
        except Exception:
            raise self._no_block(kind, index) from None

    def _no_block(self, kind: object, index: object) -> ScheduleError:
        blocks = f"{len(self.q_home)} blocks of queries and {len(self.kv_home)} of keys"
        return ScheduleError(
            f"schedule {self.name!r}: kind={shown(kind)}, index={shown(index)}; there are {blocks}: give a Kind and a number"
        )

    @property
    def resting(self) -> bool:
        """Whether any input stays away from home between the passes."""
        return bool(self.q_rest or self.kv_rest)

    def to_rest(self, move: Move) -> bool:
        """Whether `move` takes an input from its home to where it rests."""
        instance("move", move, Move, ScheduleError, "give a Move(kind, index, src, dst, depart, due)")
        at_home = move.src == self.home(move.kind, move.index)
        return not move.kind.moved and at_home and move.dst == self.rest(move.kind, move.index)

    def straight_home(self, kind: Kind) -> bool:
        """Whether every share of this kind is merged where the result rests, and so is rounded at most once on the way there.

        A complete result that goes on from there to its owner is not rounded once more: it is the result.
        """
        return instance("kind", kind, Kind, ScheduleError, "give a Kind") not in self._riding

    @cached_property
    def _riding(self) -> frozenset[Kind]:
        moved = [m for m in self.moves if m.kind.moved]
        return frozenset(m.kind for m in moved if m.dst != self.rest(m.kind, m.index) and not self._last_leg(m))

    def _last_leg(self, move: Move) -> bool:
        return (move.src, move.dst) == (self.rest(move.kind, move.index), self.home(move.kind, move.index))

    @cached_property
    def digest(self) -> str:
        return sha256(str(self).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        """One line per step; `parse` reads it back."""
        homes = f"q_home={_csv(self.q_home)} kv_home={_csv(self.kv_home)} room={_csv(self.room)}"
        if self.resting:
            homes += f" q_rest={_csv(self.q_rest)} kv_rest={_csv(self.kv_rest)}"
        tiles: list[list[str]] = [[] for _ in range(self.steps)]
        moves: list[list[str]] = [[] for _ in range(self.steps)]
        for t in self.tiles:
            tiles[t.step].append(f"r{t.rank}({t.i},{t.j})")
        for m in self.moves:
            moves[m.depart].append(str(m))
        lines = [f"{step} | {' '.join(tiles[step])} | {' '.join(moves[step])}" for step in range(self.steps)]
        return "\n".join([f"{self.name} world={self.world} {homes}", *lines])


def make(
    name: str,
    world: int,
    tiles: Iterable[Tile],
    moves: Iterable[Move],
    room: Room,
    homes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    rests: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Schedule:
    """A schedule in canonical order: by step and due step, otherwise as given. Without `homes`, block n belongs to rank n."""
    world = count("world", world, ScheduleError, most=MOST_RANKS)
    q_home, kv_home = _two("homes", homes) if homes is not None else (tuple(range(world)), tuple(range(world)))
    made = Schedule(name, world, q_home, kv_home, _all("tiles", tiles), _all("moves", moves), room, *_two("rests", rests))
    in_time = tuple(sorted(made.moves, key=lambda m: (m.depart, m.due)))  # what is needed sooner goes first on a link
    in_order = tuple(sorted(made.tiles, key=lambda t: t.step))
    return replace(made, tiles=in_order, moves=in_time)


def parse(text: str) -> Schedule:
    """The schedule that prints as `text`. Raises `ScheduleError` for any other text."""
    head, *lines = instance("text", text, str, ScheduleError, "give what str(schedule) says").strip().splitlines() or [""]
    rest = r"(?: q_rest=([\d,]*) kv_rest=([\d,]*))?"
    found = re.fullmatch(r"(.+) world=(\d+) q_home=([\d,]*) kv_home=([\d,]*) room=([\d,]*)" + rest, head)
    if found is None:
        raise ScheduleError(f"not a schedule: {shown(head)}; the first line reads 'NAME world=.. q_home=.. kv_home=.. room=..'")
    try:
        return _parsed(lines, *found.groups(default=""))
    except (ValueError, TypeError) as error:  # ScheduleError is a ValueError too
        raise ScheduleError(f"not a schedule: {error}; lines read 'STEP | rRANK(I,J) .. | KINDn:SRC>DST@DUE ..'") from error


def _parsed(
    lines: Iterable[str], name: str, world: str, q_home: str, kv_home: str, room: str, q_rest: str, kv_rest: str
) -> Schedule:
    tiles, moves = [], []
    for line in lines:
        step, tile_text, move_text = (part.strip() for part in line.split("|"))
        for rank, i, j in re.findall(r"r(\d+)\((\d+),(\d+)\)", tile_text):
            tiles.append(Tile(int(step), int(rank), int(i), int(j)))
        for kind, index, src, dst, due in re.findall(r"([A-Za-z_]+)(\d+):(\d+)>(\d+)@(\d+)", move_text):
            moves.append(Move(Kind(kind), int(index), int(src), int(dst), int(step), int(due)))
    homes, rests = (_ints(q_home), _ints(kv_home)), (_ints(q_rest), _ints(kv_rest))
    return make(name, int(world), tiles, moves, Room(*_ints(room)), homes, rests)


def _all(name: str, things: Any) -> tuple[Any, ...]:
    try:
        return tuple(things)
    except Exception:
        raise ScheduleError(f"{name}={shown(things)}; must be several of them, in a list or tuple") from None


def _two(name: str, pair: Any) -> tuple[Any, Any]:
    """Of blocks of queries and of keys."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ScheduleError(f"{name}={shown(pair)}; must be two tuples of ranks, of blocks of queries and of keys")
    return pair


def _columns(
    name: str, things: Any, kind: type[NamedTuple], error: type[ScheduleError], must: str
) -> Collection[tuple[Any, ...]]:
    """Of a tuple of `kind`, its fields, each with the values of all."""
    if not isinstance(things, tuple) or not set(map(type, things)) <= {kind}:
        raise error(f"{name}={shown(things)}; {must}")
    return list(zip(*things, strict=True)) or [()] * len(kind._fields)


def _are_numbers(columns: Iterable[tuple[Any, ...]], stop: int) -> bool:
    """Whether all are whole numbers from 0 to below `stop`."""
    return all(
        all(issubclass(kind, int) for kind in set(map(type, column))) and (not column or 0 <= min(column) <= max(column) < stop)
        for column in columns
    )


def _csv(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
