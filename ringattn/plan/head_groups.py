"""Joins schedules with a layout and a mask into head groups: heads, blocks of every rank, segments of every tile.

A head group also has its schedule after `prune`. The schedules are chosen elsewhere (`planner`), and so are the programs of the
ranks (`plan`). No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from ringattn.errors import PlanError
from ringattn.schedule import Kind, Schedule, prune, ring, side_by_side
from ringattn.schedule.program import TileBatch
from ringattn.sequence.layout import Layout, Span, even_parts, joined, take
from ringattn.sequence.mask import Mask
from ringattn.sequence.segments import Segment, tile_segments

MAX_NEEDED_SHARE = 0.9  # of the rows: if other ranks need more than this, complete blocks travel


class Block(NamedTuple):
    """Local rows [start, stop) of `rank`."""

    rank: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Heads(NamedTuple):
    """Query heads [q_start, q_stop) and the KV heads [kv_start, kv_stop) that they use, equally many queries for each."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def of_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def of_keys(self) -> int:
        return self.kv_stop - self.kv_start


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """One schedule on some of the heads, joined with layout and mask. `unpruned` is the schedule before pruning."""

    heads: Heads
    unpruned: Schedule
    q_blocks: tuple[Block, ...]
    kv_blocks: tuple[Block, ...]
    tiles: Tiles

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule with only the tiles that have work, and the moves that serve one of them."""
        return _prune(self.unpruned, self.tiles)

    def block(self, kind: Kind, index: int) -> Block:
        return (self.q_blocks if kind.of_queries else self.kv_blocks)[index]

    @property
    def areas(self) -> Mapping[tuple[int, int], int]:
        """Number of kept (query, key) pairs of every tile with work."""
        return self.tiles.areas

    def segments(self, batch: TileBatch) -> tuple[Segment, ...]:
        """What a kernel must compute of `batch`, in rows of its blocks joined in order."""
        return self.tiles.segments(batch.i, batch.j)


class Cuts(NamedTuple):
    """For each rank, the local rows at which its blocks are cut; empty where they are cut evenly."""

    q: tuple[tuple[int, ...], ...] = ()
    kv: tuple[tuple[int, ...], ...] = ()


EVENLY = Cuts()


def make_head_groups(
    schedules: Sequence[Schedule], layout: Layout, mask: Mask, heads: int, kv_heads: int, cuts: Cuts = EVENLY
) -> tuple[HeadGroup, ...]:
    """Divides the heads among `schedules` and prunes each to the tiles that have work.

    Where two schedules that move keys have only one KV head, each takes half of every rank's keys instead; otherwise schedules
    may share a KV head.

    Raises:
        PlanError: there are fewer heads than schedules.
    """
    if len(schedules) == 2 > kv_heads and _share_keys(*schedules):
        schedules = [side_by_side(*schedules)]
    if len(schedules) > heads and not any(schedule.has_residents for schedule in schedules):
        raise PlanError(f"{len(schedules)} schedules need as many heads, and there are {heads}")
    shares = share_heads(heads, kv_heads, len(schedules))
    return tuple(
        _head_group(part, schedule, layout, mask, cuts)
        for share, schedule in zip(shares, schedules, strict=True)
        for part in share
    )


def _share_keys(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules can run over the same queries, each on some of the keys."""
    queries_travel = any(move.kind.of_queries for schedule in (a, b) for move in schedule.moves)
    return a.q_owner == b.q_owner and not (a.has_residents or b.has_residents or queries_travel)


def pairs(head_groups: Sequence[HeadGroup]) -> Counter[int]:
    """Number of kept (query, key) pairs that each rank computes, over all heads."""
    counts: Counter[int] = Counter()
    for head_group in head_groups:
        areas, heads = head_group.areas, head_group.heads.of_queries
        for _, rank, i, j in head_group.unpruned.tiles:
            counts[rank] += areas.get((i, j), 0) * heads
    return counts


def share_heads(heads: int, kv_heads: int, parts: int) -> list[list[Heads]]:
    """Cuts the heads into `parts` shares, as even as possible: along KV heads where that is no less even, else between queries.

    A share that cuts through KV heads consists of several runs, each with equally many query heads for every KV head; both
    sides of the cut then use that KV head. Shares may be empty.
    """
    group = heads // kv_heads
    if -(-kv_heads // parts) * group <= -(-heads // parts):
        return [[Heads(a * group, b * group, a, b)][: b - a] for a, b in even_parts(kv_heads, parts)]
    return [list(_runs(a, b, group)) for a, b in even_parts(heads, parts)]


def _runs(start: int, stop: int, group: int) -> Iterator[Heads]:
    """Runs of query heads [start, stop): up to the next KV head, those of complete KV heads, and the remaining ones."""
    inner_start, inner_stop = -(-start // group) * group, stop // group * group
    if inner_start > inner_stop:
        inner_start = inner_stop = stop
    for a, b in ((start, min(inner_start, stop)), (inner_start, inner_stop), (max(inner_stop, inner_start), stop)):
        if a < b:
            yield Heads(a, b, a // group, -(-b // group))


# Small caches: a head group holds every segment of its mask, which for thousands of documents is megabytes.
@lru_cache(maxsize=512)
def _head_group(heads: Heads, schedule: Schedule, layout: Layout, mask: Mask, cuts: Cuts) -> HeadGroup:
    q_blocks, kv_blocks = blocks(layout, schedule.q_owner, cuts.q), blocks(layout.of_keys, schedule.kv_owner, cuts.kv)
    tiles = _tiles(q_blocks, kv_blocks, layout, mask)
    return HeadGroup(heads, schedule, q_blocks, kv_blocks, tiles)


@lru_cache(maxsize=512)
def _prune(schedule: Schedule, tiles: Tiles) -> Schedule:
    return prune(schedule, tiles.areas.keys())


class Tiles:
    """Segments and areas between the blocks of a layout under a mask; a separate object, since many head groups share it."""

    def __init__(self, q_spans: Sequence[tuple[Span, ...]], k_spans: Sequence[tuple[Span, ...]], mask: Mask) -> None:
        self.mask, self._q_spans, self._k_spans = mask, q_spans, k_spans
        self._segments: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Segment, ...]] = {}
        areas = {
            (i, j): sum(segment.area for segment in self.segments((i,), (j,)))
            for i, j in product(range(len(q_spans)), range(len(k_spans)))
        }
        self.areas = {tile: area for tile, area in areas.items() if area}

    def segments(self, i: tuple[int, ...], j: tuple[int, ...]) -> tuple[Segment, ...]:
        """The segments between query blocks `i` and key blocks `j`, each joined in order."""
        if (i, j) not in self._segments:
            q_spans, k_spans = (
                joined(span for n in numbers for span in spans[n])
                for numbers, spans in ((i, self._q_spans), (j, self._k_spans))
            )
            self._segments[i, j] = tile_segments(q_spans, k_spans, self.mask)
        return self._segments[i, j]


@lru_cache(maxsize=16)
def _tiles(q_blocks: tuple[Block, ...], kv_blocks: tuple[Block, ...], layout: Layout, mask: Mask) -> Tiles:
    return Tiles(_spans(layout, q_blocks), _spans(layout.of_keys, kv_blocks), mask)


def blocks(layout: Layout, owners: Sequence[int], cuts: Sequence[tuple[int, ...]] = ()) -> tuple[Block, ...]:
    """Blocks of every owner: they divide its rows in order, at its `cuts` if these make as many blocks, else evenly."""
    parts = {rank: _parts(layout.rows(rank), owners.count(rank), cuts[rank] if cuts else ()) for rank in set(owners)}
    return tuple(Block(rank, *next(parts[rank])) for rank in owners)


def _parts(rows: int, count: int, cuts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return pairwise((0, *cuts, rows)) if cuts and count == len(cuts) + 1 else even_parts(rows, count)


@lru_cache(maxsize=64)
def trim(layout: Layout, mask: Mask) -> Cuts:
    """Cuts before and after the rows that any other rank needs, so that the others need not travel; none if that saves little.

    With a sliding window these rows are the end of a shard's keys, with packed documents the documents shared with other ranks.
    """
    (head_group,) = make_head_groups((ring(layout.world),), layout, mask, 1, 1)
    read: dict[Kind, list[list[tuple[int, int]]]] = {kind: [[] for _ in range(layout.world)] for kind in (Kind.Q, Kind.KV)}
    for i, j in head_group.areas:
        for segment in head_group.tiles.segments((i,), (j,)) if i != j else ():
            read[Kind.Q][i].append((segment.q_start, segment.q_stop))
            read[Kind.KV][j].append((segment.k_start, segment.k_stop))
    return Cuts(_hulls(read[Kind.Q], layout), _hulls(read[Kind.KV], layout.of_keys))


def _hulls(read: Sequence[Sequence[tuple[int, int]]], layout: Layout) -> tuple[tuple[int, ...], ...]:
    """First and last row of each rank that another rank reads; empty where these are nearly all rows."""
    hulls = [(min(start for start, _ in runs), max(stop for _, stop in runs)) if runs else (0, 0) for runs in read]
    rows = sum(layout.rows(rank) for rank, runs in enumerate(read) if runs)
    return tuple(hulls) if sum(stop - start for start, stop in hulls) < MAX_NEEDED_SHARE * rows else ()


def _spans(layout: Layout, rank_blocks: Sequence[Block]) -> list[tuple[Span, ...]]:
    return [take(layout.shards[block.rank], block.start, block.stop) for block in rank_blocks]
