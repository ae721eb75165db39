"""A plan: everything about one attention that does not depend on the tensors, decided once and then obeyed.

It joins layout, mask and schedules into lanes: for each, the blocks every rank owns, the pieces of every tile, and each rank's
program. Plans are immutable, equal on every rank for equal arguments, and cached; `attention` looks nothing up and decides
nothing. How the choice is made is in `planner`; what a plan costs is in `cost`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import product
from typing import NamedTuple

from ringattn.errors import PlanError
from ringattn.layout import Layout, Span, even_parts, take
from ringattn.mask import Mask
from ringattn.pieces import Piece, pieces
from ringattn.schedule import Kind, Schedule, prune, side_by_side
from ringattn.schedule.program import Message, Step, messages, program


class Block(NamedTuple):
    """Local rows [start, stop) of `rank`."""

    rank: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Lane:
    """One schedule on KV heads [kv_heads[0], kv_heads[1]) and their query heads, joined with layout and mask."""

    kv_heads: tuple[int, int]
    schedule: Schedule
    q_blocks: tuple[Block, ...]
    kv_blocks: tuple[Block, ...]
    pieces: Mapping[tuple[int, int], tuple[Piece, ...]]
    areas: Mapping[tuple[int, int], int]  # kept (query, key) pairs of every tile

    def block(self, kind: Kind, index: int) -> Block:
        return (self.q_blocks if kind.of_queries else self.kv_blocks)[index]


@dataclass(frozen=True, eq=False)
class Plan:
    """What `make_plan` returns. Frozen and hashable; two plans are equal exactly when their digests are.

    `str(plan)` describes it for people, `digest` identifies it among ranks. `forward` and `backward` may use different
    schedules.
    """

    seq_len: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    mask: Mask
    layout: Layout
    kernel: str
    forward: tuple[Lane, ...]
    backward: tuple[Lane, ...]
    notes: str = field(default="", repr=False)

    def rows(self, rank: int) -> int:
        """Rows of the sequence that `rank` holds."""
        return self.layout.rows(rank)

    def program(self, rank: int, *, backward: bool) -> tuple[Step, ...]:
        """What `rank` does in one pass."""
        key = (rank, backward)
        if key not in self._programs:
            schedules = [lane.schedule for lane in (self.backward if backward else self.forward)]
            self._programs[key] = program(schedules, self.messages(backward=backward), rank)
        return self._programs[key]

    def messages(self, *, backward: bool) -> tuple[Message, ...]:
        """Everything that any rank sends in one pass, in the one order that all ranks keep to."""
        return self._messages[backward]

    @cached_property
    def _programs(self) -> dict[tuple[int, bool], tuple[Step, ...]]:
        return {}

    @cached_property
    def _messages(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        forward, backward = ([lane.schedule for lane in lanes] for lanes in (self.forward, self.backward))
        return messages(forward, backward=False), messages(backward, backward=True)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that agree exactly when two plans do the same thing in the same way."""
        lanes = [[(lane.kv_heads, str(lane.schedule)) for lane in lanes] for lanes in (self.forward, self.backward)]
        numbers = (self.seq_len, self.world, self.heads, self.kv_heads, self.head_dim, self.dtype, self.kernel)
        return sha256(repr((numbers, self.mask, self.layout, lanes)).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        forward, backward = (" | ".join(lane.schedule.name for lane in lanes) for lanes in (self.forward, self.backward))
        rows = sorted({self.rows(rank) for rank in range(self.world)})
        lines = [
            f"{self.seq_len} tokens, {self.heads} heads over {self.kv_heads} of {self.head_dim}, {self.dtype}, "
            f"{self.mask} mask",
            f"{self.world} ranks, {self.layout} layout, {' or '.join(map(str, rows))} rows each; kernel {self.kernel}",
            f"forward {forward}; backward {backward}",
        ]
        return "\n".join([*lines, *([self.notes] if self.notes else []), f"digest {self.digest}"])


def make_lanes(schedules: Sequence[Schedule], layout: Layout, mask: Mask, kv_heads: int) -> tuple[Lane, ...]:
    """Share the KV heads out among `schedules` and prune each to the tiles that have work.

    With fewer KV heads than lanes, two lanes share the keys instead: each takes half of every rank's rows.
    """
    if len(schedules) > kv_heads:
        if len(schedules) != 2:
            raise PlanError(f"{len(schedules)} lanes need as many KV heads, and there are {kv_heads}")
        schedules = [side_by_side(*schedules)]
    shares = even_parts(kv_heads, len(schedules))
    return tuple(_lane(share, schedule, layout, mask) for share, schedule in zip(shares, schedules, strict=True))


@lru_cache(maxsize=256)
def _lane(kv_heads: tuple[int, int], schedule: Schedule, layout: Layout, mask: Mask) -> Lane:
    q_blocks, kv_blocks = blocks(layout, schedule.q_home), blocks(layout, schedule.kv_home)
    alive, areas = _tiles(q_blocks, kv_blocks, layout, mask)
    return Lane(kv_heads, prune(schedule, alive), q_blocks, kv_blocks, alive, areas)


@lru_cache(maxsize=16)
def _tiles(
    q_blocks: tuple[Block, ...], kv_blocks: tuple[Block, ...], layout: Layout, mask: Mask
) -> tuple[dict[tuple[int, int], tuple[Piece, ...]], dict[tuple[int, int], int]]:
    """The pieces and areas of every tile that has any; kept apart, since many schedules on the same blocks ask for them."""
    q_spans, kv_spans = _spans(layout, q_blocks), _spans(layout, kv_blocks)
    found = {(i, j): pieces(q_spans[i], kv_spans[j], mask) for i, j in product(range(len(q_blocks)), range(len(kv_blocks)))}
    alive = {tile: parts for tile, parts in found.items() if parts}
    return alive, {tile: sum(piece.area for piece in parts) for tile, parts in alive.items()}


def blocks(layout: Layout, homes: Sequence[int]) -> tuple[Block, ...]:
    """Blocks with the same home divide that rank's rows evenly, in order."""
    parts = {rank: even_parts(layout.rows(rank), homes.count(rank)) for rank in set(homes)}
    return tuple(Block(rank, *next(parts[rank])) for rank in homes)


def _spans(layout: Layout, found: Sequence[Block]) -> list[tuple[Span, ...]]:
    return [take(layout.shards[block.rank], block.start, block.stop) for block in found]
