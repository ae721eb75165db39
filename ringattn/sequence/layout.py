"""Maps each rank to the global positions it holds, in local order, as spans of integers.

contiguous, zigzag, striped, uneven and empty shards are all tuples of spans. Any sequence length works on any number of ranks:
where it does not divide, some ranks hold one row more. Keys have the layout of the queries or one of their own: in
cross-attention, and where a chunk of queries attends to all keys so far. A layout knows no mask, schedule or kernel. No torch
here.

zigzag (a causal mask then costs every rank the same): Zhu 2024, https://github.com/zhuzilin/ring-flash-attention/issues/2
striped: Brandon et al. 2023, https://arxiv.org/abs/2311.09431
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

from ringattn._validation import MOST, as_int, count, instance, short_repr
from ringattn.errors import PlanError


class Span(NamedTuple):
    """The `length` global positions start, start + stride, start + 2 * stride, ..."""

    start: int
    length: int
    stride: int = 1

    def positions(self) -> range:
        return range(self.start, self.start + self.length * self.stride, self.stride)

    def cut(self, begin: int, end: int) -> Span:
        """Local elements [begin, end) of this span."""
        return Span(self.start + begin * self.stride, end - begin, self.stride)


@dataclass(frozen=True)
class Layout:
    """`shards[rank]` is the ordered tuple of spans that rank holds; each local row has one global position.

    `keys`: the layout of keys and values, if it differs from that of the queries.
    """

    name: str
    shards: tuple[tuple[Span, ...], ...]
    keys: Layout | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and isinstance(self.keys, Layout | None) and _are_shards(self.shards)):
            raise PlanError(
                f"Layout(name={short_repr(self.name)}, shards={short_repr(self.shards)}, keys={short_repr(self.keys)}); "
                "shards must be a "
                "tuple with a tuple of Span(start, length, stride) for each rank, stride 1 or more, and keys a Layout"
            )

    @property
    def world(self) -> int:
        return len(self.shards)

    @cached_property
    def digest(self) -> str:
        """16 hex digits, equal exactly when two layouts are; the same in every process."""
        return sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def of_keys(self) -> Layout:
        return self.keys or self

    @property
    def first(self) -> int:
        """The lowest position that any rank holds."""
        return min((span.start for shard in self.shards for span in shard if span.length), default=0)

    @property
    def length(self) -> int:
        """Number of positions, over all ranks."""
        return sum(span.length for shard in self.shards for span in shard)

    def rows(self, rank: int) -> int:
        """Number of rows that `rank` holds; may be 0."""
        return sum(span.length for span in self._shard(rank))

    def positions(self, rank: int) -> list[int]:
        """Global position of every local row of `rank`."""
        return [p for span in self._shard(rank) for p in span.positions()]

    def _shard(self, rank: int) -> tuple[Span, ...]:
        if not isinstance(rank, int) or not 0 <= rank < self.world:
            raise PlanError(f"rank={short_repr(rank)}; layout {self.name!r} has ranks 0 to {self.world - 1}")
        return self.shards[rank]

    def moved(self, by: int) -> Layout:
        """This layout with query positions shifted by `by`; keys keep theirs."""
        by = as_int("by", by, PlanError)
        moved = tuple(tuple(span._replace(start=span.start + by) for span in shard) for shard in self.shards)
        return Layout(self.name, moved, self.keys)

    def after(self, before: Layout) -> Layout:
        """The layout of this chunk after the chunks of `before`: each rank appends its new keys to those it holds."""
        instance("before", before, Layout, PlanError, "give the layout of the chunks so far")
        if before.world != self.world:
            raise PlanError(f"layout {self.name!r} has {self.world} shards and the one before {before.world}; cut both alike")
        old, new = before.of_keys, self.moved(before.of_keys.length - self.first)
        keys = tuple(a + b for a, b in zip(old.shards, new.shards, strict=True))
        return Layout(self.name, new.shards, Layout(f"{old.name}, {self.name}", keys))

    def validate(self, seq_len: int) -> None:
        """Checks that the shards hold `seq_len` consecutive positions, and the keys all positions from 0 on, each once.

        Raises:
            PlanError: a position is missing, held twice or outside the range, or strides differ.
        """
        seq_len = count("seq_len", seq_len, PlanError, least=0)
        spans = [span for layout in (self, self.of_keys) for shard in layout.shards for span in shard]
        strides = {span.stride for span in spans if span.length > 1}
        if len(strides) > 1:
            raise PlanError(
                f"layout {self.name!r} mixes strides {sorted(strides)}; use one stride throughout, "
                "so that a mask's band stays a band on every pair of shards"
            )
        if self.keys is not None:
            if self.keys.world != self.world:
                raise PlanError(
                    f"layout {self.name!r} has {self.world} shards and its keys {self.keys.world}; give both as many"
                )
            if not self.keys.length:
                raise PlanError(f"layout {self.name!r} has keys that hold no position; there must be one or more")
            self.keys._cover(0, self.keys.length)
        self._cover(self.first if self.keys is not None else 0, seq_len)

    def _cover(self, first: int, length: int) -> None:
        """Per residue modulo the stride, positions form runs; each run must start where the one before ends."""
        spans, stop = [span for shard in self.shards for span in shard if span.length], first + length
        stride = max((span.stride for span in spans if span.length > 1), default=1)
        runs: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            if not first <= span.start <= span.positions()[-1] < stop:
                raise PlanError(f"layout {self.name!r}: {span} does not lie in [{first}, {stop})")
            runs[span.start % stride].append(span)
        for position in range(first, min(stop, first + stride)):
            for span in sorted(runs[position % stride]):
                if span.start < position:
                    raise PlanError(f"layout {self.name!r}: positions of {span} are held twice")
                if span.start == position:
                    position += span.length * stride
            if position < stop:
                raise PlanError(f"layout {self.name!r}: position {position} of [{first}, {stop}) is held by no rank")

    def __str__(self) -> str:
        return self.name


def _are_shards(shards: object) -> bool:
    """Whether it is a tuple of tuples of valid spans."""
    return isinstance(shards, tuple) and all(isinstance(shard, tuple) and all(map(_is_span, shard)) for shard in shards)


def _is_span(span: object) -> bool:
    if not isinstance(span, Span) or not all(isinstance(number, int) for number in span):
        return False
    return abs(span.start) <= MOST and 0 <= span.length <= MOST and 1 <= span.stride <= MOST


def even_parts(length: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut [0, length) into `parts` consecutive (start, stop), the first `length % parts` of them one longer."""
    base, longer = divmod(length, parts)
    start = 0
    for n in range(parts):
        stop = start + base + (n < longer)
        yield start, stop
        start = stop


def take(spans: tuple[Span, ...], begin: int, end: int) -> tuple[Span, ...]:
    """Local rows [begin, end) of a shard, as spans."""
    parts, offset = [], 0
    for span in spans:
        lo, hi = max(begin - offset, 0), min(end - offset, span.length)
        if lo < hi:
            parts.append(span.cut(lo, hi))
        offset += span.length
    return tuple(parts)


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Joins adjacent spans; the positions stay the same."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and last.stride == span.stride and last.start + last.length * last.stride == span.start:
            merged[-1] = last._replace(length=last.length + span.length)
        else:
            merged.append(span)
    return tuple(merged)


def contiguous(seq_len: int, world: int) -> Layout:
    """Rank r holds the r-th run of consecutive positions."""
    return Layout("contiguous", tuple(_spans(Span(a, b - a)) for a, b in even_parts(seq_len, world)))


def zigzag(seq_len: int, world: int) -> Layout:
    """The sequence is cut into 2 * world chunks; rank r holds chunks r and 2 * world - 1 - r."""
    chunks = [Span(a, b - a) for a, b in even_parts(seq_len, 2 * world)]
    return Layout("zigzag", tuple(_spans(chunks[r], chunks[-1 - r]) for r in range(world)))


def striped(seq_len: int, world: int) -> Layout:
    """Rank r holds the positions r, r + world, r + 2 * world, ..."""
    counts = [len(range(r, seq_len, world)) for r in range(world)]
    return Layout("striped", tuple(_spans(Span(r, n, world)) for r, n in enumerate(counts)))


def _spans(*spans: Span) -> tuple[Span, ...]:
    return tuple(span for span in spans if span.length)


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}
