"""Where the search begins: every known algorithm, and some that are none yet, as an assignment of tiles to ranks.

    ring         at the owner of the queries
    token ring   at the owner of the keys
    grid         at the rank in the column of one owner and the row of the other, for every grid either way round
    halves       at the owner with the larger rank, or the smaller: of a causal zigzag pair, only halves then travel

What a mask leaves out never travels, so each is as good as its schedule after `split` and `prune`. Some are not balanced; the
search mends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ringattn.schedule.balanced.problem import Problem
from ringattn.schedule.grid import factors

Rule = Callable[[int, int], int]  # from the owners of queries and keys to the rank that computes


def starts(problem: Problem) -> list[tuple[int, ...]]:
    """Each start once: the rank of every tile."""
    owners = [(problem.q_home[i], problem.kv_home[j]) for i, j in problem.tiles]
    found = [tuple(rule(q, kv) for q, kv in owners) for rule in _rules(problem.world)]
    return list(dict.fromkeys(found))


def _rules(world: int) -> Iterator[Rule]:
    for a in factors(world, upto=world):  # a = 1 is the ring and a = world TokenRing, and so are they the other way round
        yield lambda q, kv, a=a: q // a * a + kv % a
        yield lambda q, kv, a=a: kv // a * a + q % a
    yield max
    yield min
