"""States the problem of the solver: which rank computes each tile, so that work is equal and few bytes travel.

A tile (i, j) may go to the owner of query block i, to the owner of key block j, or to any other rank. A rank that computes a
tile of a block it does not own is *visited* by that block: the inputs travel there once and the result returns once, for any
number of tiles. Rows and columns of the table cost alike, so both are called lines: line i is query block i, line
`len(q_owner) + j` is key block j.

Only numbers: no mask, layout, topology or time. `search` and `exact` solve the problem; `timeline` orders the result in time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import floor
from typing import NamedTuple, TypeAlias

from ringattn.errors import PlanError
from ringattn.schedule.ir import Kind

OBJECTIVES = ("total", "port", "link")

Resource: TypeAlias = tuple[str, int, int]
Assignment: TypeAlias = Mapping[tuple[int, int], int]  # the rank of every tile


class Costs(NamedTuple):
    """Bytes of one row of a visit: inputs to the visited rank, and results back to the owner."""

    q_in: int
    q_back: int
    kv_in: int
    kv_back: int = 0


class Line(NamedTuple):
    """A row or a column of the table of tiles: one block, its owner, and the bytes of one visit."""

    kind: Kind
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used here
    owner: int
    bytes_in: int
    bytes_back: int
    tiles: tuple[int, ...]  # numbers of its tiles


@dataclass(frozen=True)
class Problem:
    """A table of tiles that have work, and what it costs to compute them elsewhere.

    Attributes:
        areas: kept (query, key) pairs of every tile that has any.
        q_owner, kv_owner: the rank that owns each block. rows_q, rows_kv: rows of each block.
        objective: what is minimised: "total" bytes, bytes through the busiest "port" (out of or into one rank: a switch), or
            over the busiest directed "link" (a full mesh).
        tolerance: fraction by which the work of the busiest rank may exceed the mean; larger where the tiles require it.
    """

    world: int
    areas: Mapping[tuple[int, int], int]
    q_owner: Sequence[int]
    kv_owner: Sequence[int]
    rows_q: Sequence[int]
    rows_kv: Sequence[int]
    costs: Costs
    objective: str = "total"
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise PlanError(f"objective={self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if self.tolerance < 0:
            raise PlanError(f"tolerance={self.tolerance}: the busiest rank cannot work less than the mean; 0 or more")
        for owners, rows, name in ((self.q_owner, self.rows_q, "q"), (self.kv_owner, self.rows_kv, "kv")):
            if len(owners) != len(rows):
                raise PlanError(
                    f"{name}_owner has {len(owners)} blocks and rows_{name} {len(rows)}; both must list every block"
                )
            if any(owner not in range(self.world) for owner in owners):
                raise PlanError(f"{name}_owner={tuple(owners)}: owners must be ranks of {self.world}")
        for (i, j), area in self.areas.items():
            if not (0 <= i < len(self.q_owner) and 0 <= j < len(self.kv_owner) and area > 0):
                raise PlanError(f"tile ({i}, {j}) of area {area}: not in the table, or without work; leave it out")

    @cached_property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Tiles in the order of their numbers: the same, however `areas` is ordered."""
        return tuple(sorted(self.areas))

    @cached_property
    def area(self) -> tuple[int, ...]:
        return tuple(self.areas[tile] for tile in self.tiles)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        c = self.costs
        blocks = [(Kind.Q, i, self.q_owner[i], rows * c.q_in, rows * c.q_back) for i, rows in enumerate(self.rows_q)]
        blocks += [(Kind.KV, j, self.kv_owner[j], rows * c.kv_in, rows * c.kv_back) for j, rows in enumerate(self.rows_kv)]
        tiles: list[list[int]] = [[] for _ in blocks]
        for number, sides in enumerate(self.sides):
            for line in sides:
                tiles[line].append(number)
        return tuple(Line(*line, tuple(numbers)) for line, numbers in zip(blocks, tiles, strict=True))

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """The two lines of every tile."""
        return tuple((i, len(self.q_owner) + j) for i, j in self.tiles)

    @cached_property
    def fallback(self) -> tuple[int, ...]:
        """An assignment by work alone, the largest tile first, to the rank with least work: balanced, at any traffic."""
        load, ranks = [0] * self.world, [0] * len(self.tiles)
        for number in sorted(range(len(self.tiles)), key=lambda n: -self.area[n]):
            ranks[number] = load.index(min(load))
            load[ranks[number]] += self.area[number]
        return tuple(ranks)

    @cached_property
    def cap(self) -> int:
        """The most work a rank may have: the mean plus the tolerance, or more where tiles are too large for that."""
        limit = floor((1 + self.tolerance) * max(sum(self.area) / self.world, max(self.area, default=0)))
        return max(limit, *loads(self, self.fallback))

    def charges(self, line: Line, rank: int) -> tuple[tuple[Resource, int], ...]:
        """Bytes that one visit of `line` to `rank` adds to each resource of the objective."""
        if rank == line.owner:
            return ()
        bytes_in, bytes_back = line.bytes_in, line.bytes_back
        if self.objective == "total":
            return ((("all", 0, 0), bytes_in + bytes_back),)
        there = [(resource, bytes_in) for resource in self.route(line.owner, rank)]
        back = [(resource, bytes_back) for resource in self.route(rank, line.owner)]
        return tuple((resource, nbytes) for resource, nbytes in (*there, *back) if nbytes)

    def route(self, src: int, dst: int) -> tuple[Resource, ...]:
        """The resources that a message occupies. Only in a full mesh do links not share ports."""
        return (("link", src, dst),) if self.objective == "link" else (("out", src, 0), ("in", dst, 0))

    def ranks(self, assignment: Assignment) -> list[int]:
        return [assignment[tile] for tile in self.tiles]


def loads(problem: Problem, ranks: Sequence[int]) -> list[int]:
    """The work of every rank."""
    load = [0] * problem.world
    for rank, area in zip(ranks, problem.area, strict=True):
        load[rank] += area
    return load


def visits(problem: Problem, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Every visit, as (line, foreign rank)."""
    visitors = ((n, {ranks[tile] for tile in line.tiles} - {line.owner}) for n, line in enumerate(problem.lines))
    return [(n, rank) for n, foreign in visitors for rank in sorted(foreign)]


class Measure(NamedTuple):
    """The costs of an assignment: bytes in total, at the busiest port, on the busiest link; work of the busiest rank."""

    total: int
    port: int
    link: int
    load: int


def measure(problem: Problem, assignment: Assignment) -> Measure:
    """All costs of `assignment`, for any objective."""
    ranks = problem.ranks(assignment)
    links: Counter[tuple[int, int]] = Counter()
    for n, rank in visits(problem, ranks):
        line = problem.lines[n]
        links[line.owner, rank] += line.bytes_in
        links[rank, line.owner] += line.bytes_back
    all_ranks = range(problem.world)
    ports = [sum(links[src, dst] for dst in all_ranks) for src in all_ranks]
    ports += [sum(links[src, dst] for src in all_ranks) for dst in all_ranks]
    link = max((links[pair] for pair in product(all_ranks, all_ranks)), default=0)
    return Measure(sum(links.values()), max(ports), link, max(loads(problem, ranks)))
