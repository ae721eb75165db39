"""Where the search begins: every known algorithm, and some that are none yet, as an assignment of tiles to ranks.

    ring         at the owner of the queries
    token ring   at the owner of the keys
    grid         at the rank in the row of one owner and the column of the other, for every grid and either way round
    halves       at the owner with the larger rank, or the smaller: of a causal zigzag pair, only halves then travel

What a mask leaves out never travels, so each is as good as its schedule after `split` and `prune`. Some are not balanced; the
search mends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ringattn.schedule.balanced.problem import Problem
from ringattn.schedule.grid import factors

Rule = Callable[[int, int], int]  # from the owners of queries and keys to the rank that computes


def starts(problem: Problem) -> list[tuple[int, ...]]:
    """Each start once: the rank of every tile."""
    owners = [(problem.q_home[i], problem.kv_home[j]) for i, j in problem.tiles]
    found = [tuple(rule(q, kv) for q, kv in owners) for rule in _rules(problem.world)]
    return list(dict.fromkeys(found))


def _rules(world: int) -> Iterator[Rule]:
    for columns in factors(world, upto=world):  # one column is the ring, `world` columns are TokenRing
        yield partial(_row_of_queries, columns)
        yield partial(_row_of_keys, columns)
    yield max
    yield min


def _row_of_queries(columns: int, q: int, kv: int) -> int:
    return q // columns * columns + kv % columns


def _row_of_keys(columns: int, q: int, kv: int) -> int:
    return kv // columns * columns + q % columns
