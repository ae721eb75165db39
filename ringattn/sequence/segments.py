"""Joins a layout and a mask: lists the parts of a tile that must be computed, in local indices.

A tile is one shard of queries against one shard of keys. `tile_segments` cuts it into rectangles that are full, square causal,
or carry a band; together they cover every kept pair exactly once and nothing else. Kernels know masks only in this form.

A causal segment is always square, because aten aligns causal top-left and flash-attn bottom-right, and on squares they agree.
Rows and keys without work are trimmed, so each row of a segment sees a key. Neighbours are joined: under causal every pair of
zigzag or striped shards is one segment. No torch here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ringattn.sequence.layout import Span
from ringattn.sequence.mask import END, Band, Mask, Rect

FULL = Band()
CAUSAL = Band(right=0)
FEW = 8  # fewer spans than this are searched linearly


class Segment(NamedTuple):
    """Local rows [q_start, q_stop) against local keys [k_start, k_stop); the band is relative to these starts."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    band: Band

    @property
    def rows(self) -> int:
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def area(self) -> int:
        """Number of kept (query, key) pairs: the sum of `visible` over all rows, in closed form."""
        left, right = self.band
        cut = min(max(self.keys - right, 0), self.rows)  # rows whose last key is set by the band, not by the edge
        full = min(max(-left, 0), self.rows)  # rows that see from the first key on
        stops = cut * (2 * right + cut + 1) // 2 + (self.rows - cut) * self.keys
        starts = (self.rows - full) * (2 * left + full + self.rows - 1) // 2
        return stops - starts

    def visible(self, row: int) -> int:
        """Number of keys that local row `row` of the segment sees."""
        return min(self.keys, row + self.band.right + 1) - max(0, row + self.band.left)


def tile_segments(q_spans: tuple[Span, ...], k_spans: tuple[Span, ...], mask: Mask) -> tuple[Segment, ...]:
    """The segments of the tile (q_spans, k_spans) under `mask`; empty when no query sees a key."""
    keys = _Keys(k_spans)
    segments = (
        segment
        for q_offset, q_span in _with_offsets(q_spans)
        for rect in mask.near(q_span.start, q_span.start + q_span.length * q_span.stride)
        for k_offset, k_span in keys.near(q_span, rect)
        for segment in _segments_in_rect(q_span, k_span, rect, q_offset, k_offset)
    )
    return _join(segments)


class _Keys:
    """Finds the key spans that a query span may see; with thousands of documents most lie outside its range."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self._placed = list(_with_offsets(spans))
        if len(spans) >= FEW:
            self._placed.sort(key=lambda placed: placed[1].start)
        self._starts = [span.start for _, span in self._placed]
        self._stops = [span.start + span.length * span.stride for _, span in self._placed]
        self._disjoint = all(stop <= start for stop, start in zip(self._stops, self._starts[1:], strict=False))

    def near(self, q_span: Span, rect: Rect) -> list[tuple[int, Span]]:
        """The key spans, with local offsets, that queries of `q_span` may see within `rect`."""
        if not self._disjoint or len(self._placed) < FEW:
            return self._placed
        last = q_span.start + (q_span.length - 1) * q_span.stride
        start, stop = max(rect.k_start, q_span.start + rect.band.left), min(rect.k_stop, last + rect.band.right + 1)
        return self._placed[bisect_right(self._stops, start) : bisect_left(self._starts, stop)]


def strips(segment: Segment, rows: int) -> Iterator[Segment]:
    """Cuts a band segment into runs of at most `rows` rows, each against only the keys those rows see."""
    left, right = segment.band
    for begin, end in zip(range(0, segment.rows, rows), [*range(rows, segment.rows, rows), segment.rows], strict=True):
        first, last = max(0, begin + left), min(segment.keys, end + right)
        band = Band(left + begin - first, right + begin - first if right < END else END)
        yield Segment(segment.q_start + begin, segment.q_start + end, segment.k_start + first, segment.k_start + last, band)


def _with_offsets(spans: tuple[Span, ...]) -> Iterator[tuple[int, Span]]:
    offset = 0
    for span in spans:
        yield offset, span
        offset += span.length


def _segments_in_rect(q_span: Span, k_span: Span, rect: Rect, q_offset: int, k_offset: int) -> Iterator[Segment]:
    """One query span against one key span inside one rectangle: trims rows and keys without work."""
    q0, q1 = _inside(q_span, rect.q_start, rect.q_stop)
    k0, k1 = _inside(k_span, rect.k_start, rect.k_stop)
    if q0 >= q1 or k0 >= k1:
        return
    # position(k) - position(q) = shift + stride * (k - q) in local indices, so a band stays a band.
    stride = q_span.stride if q_span.length > 1 else k_span.stride
    shift = (k_span.start + k0 * k_span.stride) - (q_span.start + q0 * q_span.stride)
    left, right = -((shift - rect.band.left) // stride), (rect.band.right - shift) // stride
    rows, keys = q1 - q0, k1 - k0
    row0, row1 = max(0, -right), min(rows, keys - left)
    key0, key1 = max(0, left), min(keys, rows + right)
    if left > right or row0 >= row1 or key0 >= key1:  # a stride can step over a narrow band entirely
        return
    left, right = left + row0 - key0, right + row0 - key0
    q0, k0 = q_offset + q0 + row0, k_offset + k0 + key0
    yield from _normalized(q0, q0 + row1 - row0, k0, k0 + key1 - key0, left, right)


def _inside(span: Span, start: int, stop: int) -> tuple[int, int]:
    """Local elements of the span whose positions lie in [start, stop)."""
    first = -((span.start - start) // span.stride)
    end = -((span.start - stop) // span.stride)
    return max(0, first), min(span.length, end)


def _normalized(q0: int, q1: int, k0: int, k1: int, left: int, right: int) -> Iterator[Segment]:
    """Full, square causal with full rectangles split off, or a two-sided band."""
    rows, keys = q1 - q0, k1 - k0
    if left > 1 - rows:
        unbounded = right >= keys - 1
        yield Segment(q0, q1, k0, k1, Band(left, END if unbounded else right))
    elif right >= keys - 1:
        yield Segment(q0, q1, k0, k1, FULL)
    else:
        # Row i sees keys 0 .. right + i: `right` keys for all rows, a square triangle, and rows below that see all other keys.
        side = min(rows, keys - right)
        yield Segment(q0, q1, k0, k0 + right, FULL)
        yield Segment(q0, q0 + side, k0 + right, k0 + right + side, CAUSAL)
        yield Segment(q0 + side, q1, k0 + right, k1, FULL)


def _join(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Joins neighbours: full beside full, full below full, and triangle + square + triangle to one triangle."""
    stack: list[Segment] = []
    for segment in segments:
        if segment.rows and segment.keys:
            stack.append(segment)
            while _join_top(stack):
                pass
    return tuple(stack)


def _join_top(stack: list[Segment]) -> bool:
    if len(stack) >= 2 and stack[-2].band == stack[-1].band == FULL:
        a, b = stack[-2:]
        if (a.q_start, a.q_stop, a.k_stop) == (b.q_start, b.q_stop, b.k_start):
            stack[-2:] = [a._replace(k_stop=b.k_stop)]
            return True
        if (a.k_start, a.k_stop, a.q_stop) == (b.k_start, b.k_stop, b.q_start):
            stack[-2:] = [a._replace(q_stop=b.q_stop)]
            return True
    if len(stack) >= 3 and [p.band for p in stack[-3:]] == [CAUSAL, FULL, CAUSAL]:
        a, b, c = stack[-3:]
        square = b == (a.q_stop, c.q_stop, a.k_start, a.k_stop, FULL)
        if square and (c.q_start, c.k_start) == (a.q_stop, a.k_stop):
            stack[-3:] = [a._replace(q_stop=c.q_stop, k_stop=c.k_stop)]
            return True
    return False
