"""What a rank computes next, of what it has: tiles that are rows times columns, up to a grain of work in one go.

First the foreign block that it can finish soonest, since its result then leaves; then any work on foreign blocks; work on its
own blocks alone last. So that is left for the beginning, when nothing else has arrived yet, and for the end, when the last
results travel. Fewer and larger kernel calls are better, but nothing can be taken in or sent during one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ringattn.schedule.balanced.problem import Problem


def next_batch(problem: Problem, rank: int, left: Collection[int], here: Collection[int], grain: int) -> tuple[int, ...]:
    """Of the tiles that are `left` to `rank`, some whose blocks are `here`. A single tile may be more than the grain."""
    able = {tile for tile in left if ready(problem, tile, here)}
    lines = {line for tile in able for line in problem.sides[tile]}
    if not lines:
        return ()
    first = min(lines, key=lambda line: _delay(problem, line, rank, left, able))
    chosen = _fill(problem, [tile for tile in problem.lines[first].tiles if tile in able], grain)
    crossings = {_crossing(problem, tile, first) for tile in chosen}
    for line in sorted(lines - {first}):
        if _alike(problem, line, first, rank):
            more = [t for t in problem.lines[line].tiles if t in able and _crossing(problem, t, line) in crossings]
            if len(more) == len(crossings) and sum(problem.area[tile] for tile in chosen + more) <= grain:
                chosen += more
    return tuple(sorted(chosen))


def ready(problem: Problem, tile: int, lines: Collection[int]) -> bool:
    """Whether both blocks of `tile` are among `lines`."""
    a, b = problem.sides[tile]
    return a in lines and b in lines


def _delay(problem: Problem, line: int, rank: int, left: Collection[int], able: set[int]) -> tuple[int, int, int]:
    """Least for the block to work on first."""
    mine = [tile for tile in problem.lines[line].tiles if tile in left]
    area = sum(problem.area[tile] for tile in mine)
    if problem.lines[line].home == rank:
        return 3, area, line
    if not problem.lines[line].bytes_home:
        return 2, area, line
    return int(not able.issuperset(mine)), area, line


def _fill(problem: Problem, tiles: Sequence[int], grain: int) -> list[int]:
    chosen: list[int] = []
    area = 0
    for tile in tiles:
        area += problem.area[tile]
        if chosen and area > grain:
            break
        chosen.append(tile)
    return chosen


def _alike(problem: Problem, line: int, other: int, rank: int) -> bool:
    """Both queries or both keys, both own or both foreign."""
    a, b = problem.lines[line], problem.lines[other]
    return a.kind is b.kind and (a.home == rank) is (b.home == rank)


def _crossing(problem: Problem, tile: int, line: int) -> int:
    a, b = problem.sides[tile]
    return b if a == line else a
