"""Builds a layout for packed documents that keeps each document on one rank as far as balance allows.

A document that lies on one rank sends nothing. Zigzag over the whole sequence balances one causal triangle, but not many of
different sizes: a rank may hold the ends of two long documents, or a hundred short ones. Cutting every document separately
balances all of them, but cuts short ones into tiny parts. This layout is in between. It uses only the document boundaries of a
mask. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from ringattn.sequence.layout import Layout, Span

EVEN = 1.05  # the most rows, and the most work, that a rank may have, in multiples of the mean


def by_documents(bounds: Sequence[int], world: int) -> Layout:
    """Assigns documents [bounds[n], bounds[n + 1]) to ranks: short ones uncut, longer ones each cut as in zigzag.

    Documents up to a length limit stay uncut. In order of decreasing length, each goes to the rank with the fewest rows so far.
    The limit starts at an even share of the rows and is halved, down to 0, until neither the rows nor the causal work of any
    rank exceed `EVEN` times the mean. Within a shard, parts of cut documents come before uncut ones, so that uncut ones need
    not travel with them. Adjacent documents of one row each, such as padding, count as one document: cutting it costs nothing.

    Args:
        bounds: first position of every document, then the length of the sequence; it starts with 0 and never decreases.
        world: number of ranks.
    """
    documents = sorted(_document_runs(bounds), key=lambda run: (-run.length, run.start))
    share, limit = bounds[-1] / world, bounds[-1] // world
    work = sum(run.work for run in documents) / world
    while True:
        rows, squares, shards = _distribute(documents, world, limit)
        if limit == 0 or (max(rows) <= EVEN * share and max(squares) <= EVEN * work):
            return Layout("documents", tuple(tuple(shard) for shard in shards))
        limit //= 2


class DocumentRun(NamedTuple):
    """One document, or several adjacent ones of one row each."""

    length: int
    start: int
    rows_each: int  # rows of one document

    @property
    def work(self) -> int:
        """Cost to compute: the square of a document's rows, summed over documents."""
        return self.length * self.rows_each


def _document_runs(bounds: Sequence[int]) -> Iterator[DocumentRun]:
    lengths = ((b - a, a) for a, b in pairwise(bounds) if a < b)
    for one_row, group in groupby(lengths, key=lambda document: document[0] == 1):
        documents = list(group)
        if one_row:
            yield DocumentRun(len(documents), documents[0][1], 1)
        else:
            yield from (DocumentRun(length, start, length) for length, start in documents)


def _distribute(documents: Sequence[DocumentRun], world: int, limit: int) -> tuple[list[int], list[float], list[list[Span]]]:
    """Rows, causal work and spans of every rank when documents of at most `limit` rows stay uncut."""
    shards: list[list[Span]] = [[] for _ in range(world)]
    rows, squares, offset = [0] * world, [0.0] * world, 0
    for run in documents:
        length, start, _ = run
        if length <= limit:
            rank = min(range(world), key=rows.__getitem__)
            shards[rank].append(Span(start, length))
            rows[rank] += length
            squares[rank] += run.work
            continue
        # 2 * world chunks; which of them are one row longer rotates, so that ranks stay even over all documents.
        base, longer = divmod(length, 2 * world)
        for n in range(2 * world):
            size = base + ((n - offset) % (2 * world) < longer)
            rank = min(n, 2 * world - 1 - n)
            if size:
                shards[rank].append(Span(start, size))
                rows[rank] += size
            start += size
        offset += longer
        squares = [square + run.work / world for square in squares]
    return rows, squares, shards
