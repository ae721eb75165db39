"""Puts slow tests first, spread over the processes that share a run, so that none of them is left with a long one at the end.

pytest-xdist gives each process a stretch of the list, and whoever is done takes half of what another has left, from its end.
"""

from itertools import groupby

import pytest


def spread(items: list[pytest.Item], workers: int) -> None:
    """Reorders `items` in place. The tests of a file stay in their order, those marked slow stay neighbours, as they may share
    fixtures."""
    slow, quick = ([item for item in items if bool(item.get_closest_marker("slow")) == wanted] for wanted in (True, False))
    files = [list(of_file) for _, of_file in groupby(slow, lambda item: item.path)]
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for of_file in sorted(files, key=len, reverse=True):  # the share that is shortest gets the next
        min(shares, key=len).extend(of_file)
    sizes = [len(items) * (n + 1) // workers - len(items) * n // workers for n in range(workers)]
    rest = iter(quick)
    for share, size in zip(shares, sizes, strict=True):
        share += [item for _, item in zip(range(size - len(share)), rest, strict=False)]
    items[:] = [item for share in shares for item in share] + list(rest)
