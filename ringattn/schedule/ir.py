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
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

from ringattn.errors import ScheduleError


class Kind(Enum):
    Q = "Q"
    KV = "KV"
    Q_ACC = "Q_ACC"
    KV_ACC = "KV_ACC"

    __hash__ = object.__hash__  # that of Enum is slow, and every item and move is hashed often

    def __init__(self, name: str) -> None:
        self.moved = name.endswith("ACC")  # accumulators are moved and merged; inputs are copied
        self.of_queries = name.startswith("Q")


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

    @cached_property
    def steps(self) -> int:
        """One more than the last step in which anything happens; the last one may only take in what is due."""
        return max([t.step for t in self.tiles] + [m.due for m in self.moves], default=0) + 1

    def home(self, kind: Kind, index: int) -> int:
        return (self.q_home if kind.of_queries else self.kv_home)[index]

    def rest(self, kind: Kind, index: int) -> int:
        """Where an input stays between forward and backward."""
        rests = (self.q_rest or self.q_home) if kind.of_queries else (self.kv_rest or self.kv_home)
        return rests[index]

    @property
    def resting(self) -> bool:
        """Whether any input stays away from home between the passes."""
        return bool(self.q_rest or self.kv_rest)

    def to_rest(self, move: Move) -> bool:
        """Whether `move` takes an input from its home to where it rests."""
        at_home = move.src == self.home(move.kind, move.index)
        return not move.kind.moved and at_home and move.dst == self.rest(move.kind, move.index)

    def straight_home(self, kind: Kind) -> bool:
        """Whether every share of this kind is merged where the result rests, and so is rounded at most once on the way there.

        A complete result that goes on from there to its owner is not rounded once more: it is the result.
        """
        return kind not in self._riding

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
    q_home, kv_home = homes or (tuple(range(world)), tuple(range(world)))
    in_time = tuple(sorted(moves, key=lambda m: (m.depart, m.due)))  # what is needed sooner goes first on a link
    in_order = tuple(sorted(tiles, key=lambda t: t.step))
    return Schedule(name, world, q_home, kv_home, in_order, in_time, room, *rests)


def parse(text: str) -> Schedule:
    """The schedule that prints as `text`."""
    head, *lines = text.strip().splitlines()
    rest = r"(?: q_rest=([\d,]*) kv_rest=([\d,]*))?"
    found = re.fullmatch(r"(.+) world=(\d+) q_home=([\d,]*) kv_home=([\d,]*) room=([\d,]*)" + rest, head)
    if found is None:
        raise ScheduleError(f"not a schedule: {head!r}; the first line reads 'NAME world=.. q_home=.. kv_home=.. room=..'")
    name, world, q_home, kv_home, room, q_rest, kv_rest = found.groups(default="")
    tiles, moves = [], []
    for line in lines:
        step, tile_text, move_text = (part.strip() for part in line.split("|"))
        for rank, i, j in re.findall(r"r(\d+)\((\d+),(\d+)\)", tile_text):
            tiles.append(Tile(int(step), int(rank), int(i), int(j)))
        for kind, index, src, dst, due in re.findall(r"([A-Za-z_]+)(\d+):(\d+)>(\d+)@(\d+)", move_text):
            moves.append(Move(Kind(kind), int(index), int(src), int(dst), int(step), int(due)))
    homes, rests = (_ints(q_home), _ints(kv_home)), (_ints(q_rest), _ints(kv_rest))
    return make(name, int(world), tiles, moves, Room(*_ints(room)), homes, rests)


def _csv(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
