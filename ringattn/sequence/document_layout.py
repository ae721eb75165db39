"""A layout for packed documents: whole ones on one rank as far as balance allows, since a document on one rank sends nothing.

Zigzag over the whole sequence balances one causal triangle, and not many of different sizes: a rank may hold the ends of two
long documents, or a hundred short ones. Cutting every document for itself balances all of them, and cuts what is short into
crumbs. This is in between. It knows where documents begin and end and nothing else of a mask; no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from ringattn.sequence.layout import Layout, Span

EVEN = 1.05  # times the mean may a rank hold, or compute


def by_documents(bounds: Sequence[int], world: int) -> Layout:
    """Documents [bounds[n], bounds[n + 1]) kept whole on a rank as far as balance allows; longer ones cut as zigzag is, each.

    Those up to a certain length stay whole, each with the rank that has the fewest rows so far, the longest first. Of all
    halvings of an even share, down to no document at all, that length is the first at which neither rows nor causal work of any
    rank are more than `EVEN` times the mean. Parts of cut documents stand before whole ones, which need not travel with them.
    Documents of one row each that stand one behind another, as padding may, are dealt out as one: any cut through them is free.
    """
    documents = sorted(_units(bounds), key=lambda unit: (-unit.length, unit.start))
    share, limit = bounds[-1] / world, bounds[-1] // world
    work = sum(unit.work for unit in documents) / world
    while True:
        rows, squares, shards = _dealt(documents, world, limit)
        if limit == 0 or (max(rows) <= EVEN * share and max(squares) <= EVEN * work):
            return Layout("documents", tuple(tuple(shard) for shard in shards))
        limit //= 2


class Unit(NamedTuple):
    """A document, or several of one row each."""

    length: int
    start: int
    each: int  # rows of one document

    @property
    def work(self) -> int:
        """What it costs to compute, as the square of a document's rows."""
        return self.length * self.each


def _units(bounds: Sequence[int]) -> Iterator[Unit]:
    lengths = ((b - a, a) for a, b in pairwise(bounds) if a < b)
    for one_row, some in groupby(lengths, key=lambda document: document[0] == 1):
        documents = list(some)
        if one_row:
            yield Unit(len(documents), documents[0][1], 1)
        else:
            yield from (Unit(length, start, length) for length, start in documents)


def _dealt(documents: Sequence[Unit], world: int, limit: int) -> tuple[list[int], list[float], list[list[Span]]]:
    """Rows, causal work and spans of every rank, when documents of at most `limit` rows stay whole."""
    shards: list[list[Span]] = [[] for _ in range(world)]
    rows, squares, turn = [0] * world, [0.0] * world, 0
    for unit in documents:
        length, start, _ = unit
        if length <= limit:
            rank = min(range(world), key=rows.__getitem__)
            shards[rank].append(Span(start, length))
            rows[rank] += length
            squares[rank] += unit.work
            continue
        # 2 * world chunks, of which those that are one longer come round in turn: over all documents ranks stay even.
        base, longer = divmod(length, 2 * world)
        for n in range(2 * world):
            size = base + ((n - turn) % (2 * world) < longer)
            rank = min(n, 2 * world - 1 - n)
            if size:
                shards[rank].append(Span(start, size))
                rows[rank] += size
            start += size
        turn += longer
        squares = [square + unit.work / world for square in squares]
    return rows, squares, shards
