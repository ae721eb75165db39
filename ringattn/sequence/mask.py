"""Represents attention masks as disjoint rectangles over global positions, each with a band.

A query at position q sees the key at position k when some rectangle contains (q, k) and `left <= k - q <= right` holds in its
band. Full, causal, sliding window, packed documents and prefix-LM all have this form, in one to four lines each, and `a & b`
intersects any two. A mask knows no ranks, layouts, schedules or kernels; `segments` joins it with a layout.

A mask usually has no sequence length: the plan supplies it, and `END` stands for "to the end". No torch here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from ringattn._validation import as_int, count, counts, flag, instance, short_repr
from ringattn.errors import PlanError

END = 1 << 60  # larger than any sequence; sums and differences still fit in 64 bits


class Band(NamedTuple):
    """Keep (q, k) iff `left <= k - q <= right`; -END and END mean unbounded."""

    left: int = -END
    right: int = END


class Rect(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), of which the pairs in the band are kept."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    band: Band


@dataclass(frozen=True)
class Mask:
    """A named union of disjoint rectangles. `length` is the sequence length the mask requires, if any."""

    name: str
    rects: tuple[Rect, ...]
    length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.rects, tuple) or not all(map(_is_rect, self.rects)):
            raise PlanError(
                f"Mask(name={short_repr(self.name)}, rects={short_repr(self.rects)}); rects must be a tuple of "
                "Rect(q_start, q_stop, k_start, k_stop, Band(left, right)) of whole numbers, and the name a text"
            )
        if self.length is not None:
            count("length", self.length, PlanError, least=0)

    def keeps(self, q: int, k: int) -> bool:
        """Whether the query at position `q` sees the key at position `k`."""
        q, k = as_int("q", q, PlanError), as_int("k", k, PlanError)
        return any(
            r.q_start <= q < r.q_stop and r.k_start <= k < r.k_stop and r.band.left <= k - q <= r.band.right for r in self.rects
        )

    def near(self, start: int, stop: int) -> tuple[Rect, ...]:
        """The rectangles that queries of [start, stop) can see; of thousands of documents, a few."""
        start, stop = as_int("start", start, PlanError), as_int("stop", stop, PlanError)
        if not self._rects_ascend:
            return self.rects
        rects, starts, stops = self._ordered_rects
        return rects[bisect_right(stops, start) : bisect_left(starts, stop)]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """First position of every packed document, then the end of the last; empty if the mask is not made of documents."""
        rects = self.rects
        separate = all((r.q_start, r.q_stop) == (r.k_start, r.k_stop) for r in rects)
        packed = bool(rects) and separate and all(a.q_stop == b.q_start for a, b in pairwise(rects))
        return (
            (*(r.q_start for r in rects), rects[-1].q_stop)
            if packed and rects[0].q_start == 0 and rects[-1].q_stop < END
            else ()
        )

    @cached_property
    def _rects_ascend(self) -> bool:
        """Whether both row bounds never decrease over the rectangles, so that those near a row are adjacent."""
        return all(a.q_start <= b.q_start and a.q_stop <= b.q_stop for a, b in pairwise(self.rects))

    @cached_property
    def _ordered_rects(self) -> tuple[tuple[Rect, ...], list[int], list[int]]:
        """The mask in fewer rectangles, with the first and end row of each.

        Adjacent documents of one row each become one diagonal: padding whose positions restart at every token makes thousands.
        """
        rects: list[Rect] = []
        for rect in self.rects:
            last = rects[-1] if rects else None
            if last and (last.q_stop, last.k_stop) == rect[0:4:2] and _is_diagonal(last) and _is_diagonal(rect):
                shift = rect.k_start - rect.q_start
                rects[-1] = last._replace(q_stop=rect.q_stop, k_stop=rect.k_stop, band=Band(shift, shift))
            else:
                rects.append(rect)
        return tuple(rects), [r.q_start for r in rects], [r.q_stop for r in rects]

    def __and__(self, other: Mask) -> Mask:
        """Keeps the pairs that both masks keep, for example `documents(cu_seqlens) & sliding_window(4096)`."""
        instance("mask & other: other", other, Mask, PlanError, "masks are intersected with masks, as in full() & causal()")
        if None not in (self.length, other.length) and self.length != other.length:
            raise PlanError(f"masks for {self.length} and {other.length} tokens cannot be intersected")
        intersections = (_intersect(a, b) for a in self.rects for b in other.rects)
        length = self.length if self.length is not None else other.length
        return Mask(f"{self.name} & {other.name}", tuple(r for r in intersections if r is not None), length)

    def __str__(self) -> str:
        return self.name


def _is_rect(rect: object) -> bool:
    return (
        isinstance(rect, Rect)
        and isinstance(rect.band, Band)
        and all(isinstance(number, int) for number in (*rect[:4], *rect.band))
    )


def _is_diagonal(rect: Rect) -> bool:
    """Whether the rectangle is square and each row sees only the key at its own position."""
    rows, keys, shift = rect.q_stop - rect.q_start, rect.k_stop - rect.k_start, rect.k_start - rect.q_start
    return rows == keys and (rect.band == (shift, shift) or (rows == 1 and rect.band.left <= shift <= rect.band.right))


def _intersect(a: Rect, b: Rect) -> Rect | None:
    q_start, q_stop = max(a.q_start, b.q_start), min(a.q_stop, b.q_stop)
    k_start, k_stop = max(a.k_start, b.k_start), min(a.k_stop, b.k_stop)
    band = Band(max(a.band.left, b.band.left), min(a.band.right, b.band.right))
    empty = q_start >= q_stop or k_start >= k_stop or band.left > band.right
    return None if empty else Rect(q_start, q_stop, k_start, k_stop, band)


def full() -> Mask:
    """Every query sees every key."""
    return Mask("full", (Rect(0, END, 0, END, Band()),))


def causal() -> Mask:
    """A query sees keys at its own position and before."""
    return Mask("causal", (Rect(0, END, 0, END, Band(right=0)),))


def sliding_window(left: int, right: int = 0) -> Mask:
    """A query at q sees keys q - left .. q + right. `right=0` is causal; flash-attn's `window_size=(left, right)`."""
    hint = "flash-attn's -1 (no limit) is full(), or causal() with right=0"
    left, right = (count(name, value, PlanError, least=0, hint=hint) for name, value in (("left", left), ("right", right)))
    return Mask(f"window({left},{right})", (Rect(0, END, 0, END, Band(-left, right)),))


def documents(cu_seqlens: Sequence[int], causal: bool = True) -> Mask:
    """Packed documents that do not see each other; `cu_seqlens` = (0, end of the first, ..., seq_len), as in flash-attn."""
    cu, causal = counts("cu_seqlens", cu_seqlens, PlanError), flag("causal", causal, PlanError)
    if len(cu) < 2 or cu[0] != 0 or any(a > b for a, b in pairwise(cu)):
        raise PlanError(
            f"documents(cu_seqlens={short_repr(cu)}): must start with 0 and never decrease, one entry more than documents"
        )
    band = Band(right=0) if causal else Band()
    rects = tuple(Rect(a, b, a, b, band) for a, b in pairwise(cu) if a < b)
    return Mask(f"{'causal ' if causal else ''}documents({len(rects)})", rects, length=cu[-1])


def prefix_lm(prefix: int) -> Mask:
    """The first `prefix` tokens see each other in both directions; later tokens are causal and see the whole prefix."""
    prefix = count("prefix", prefix, PlanError, least=0)
    rects = (Rect(0, END, 0, prefix, Band()), Rect(prefix, END, prefix, END, Band(right=0)))
    return Mask(f"prefix({prefix})", rects[prefix == 0 :])


def bidirectional_blocks(bounds: Sequence[tuple[int, int]], base: Mask | None = None) -> Mask:
    """`base`, plus full attention within each block: images inside causal text, or a prefix before it.

    Args:
        bounds: (start, stop) of each block in global positions, in order, without overlap.
        base: the mask outside the blocks; `causal()` by default. Its window does not apply within a block.

    Raises:
        PlanError: blocks overlap, are not in order, or go beyond the length of `base`.
    """
    base = causal() if base is None else instance("base", base, Mask, PlanError, "such as causal() or sliding_window(4096)")
    blocks = [counts("a block of bounds", block, PlanError) for block in bounds]
    ends = [edge for block in blocks for edge in block]
    length = END if base.length is None else base.length
    if any(len(block) != 2 for block in blocks) or any(a > b for a, b in pairwise([0, *ends, length])):
        raise PlanError(
            f"bidirectional_blocks(bounds={short_repr(bounds)}): pass (start, stop) of each block, in order, without overlap"
            + ("" if base.length is None else f", within {base.length} tokens")
        )
    blocks = [block for block in blocks if block[0] < block[1]]
    rects = [part for rect in base.rects for part in _without_blocks(rect, blocks)]
    rects += [Rect(start, stop, start, stop, Band()) for start, stop in blocks]
    return Mask(f"{base.name} | blocks({len(blocks)})", tuple(sorted(rects)), base.length)


def _without_blocks(rect: Rect, blocks: Sequence[Sequence[int]]) -> Iterator[Rect]:
    """The parts of `rect` that remain when the rows of each block skip the keys of their own block."""
    row = rect.q_start
    for start, stop in blocks[bisect_right(blocks, rect.q_start, key=itemgetter(1)) :]:
        if start >= rect.q_stop:
            break
        yield from _not_empty(rect._replace(q_start=row, q_stop=start))
        within = rect._replace(q_start=max(row, start), q_stop=min(stop, rect.q_stop))
        yield from _not_empty(within._replace(k_stop=min(start, rect.k_stop)))
        yield from _not_empty(within._replace(k_start=max(stop, rect.k_start)))
        row = within.q_stop
    yield from _not_empty(rect._replace(q_start=row))


def _not_empty(rect: Rect) -> Iterator[Rect]:
    """Yields the rectangle if it keeps any pair."""
    q_last, k_last = rect.q_stop - 1, rect.k_stop - 1
    visible = rect.k_start - q_last <= rect.band.right and k_last - rect.q_start >= rect.band.left
    if rect.q_start < rect.q_stop and rect.k_start < rect.k_stop and visible:
        yield rect
