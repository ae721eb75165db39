"""Prices a pass at any number of ranks without a schedule: all choices of 4,096 ranks in a tenth of a second.

Every member of the family (`family`) is symmetric: all ranks do the same at the same time, so one rank on a clock (`clock`)
stands for all, steps form long runs of equal ones (`rounds`), and links are loaded by shifts of all ranks (`shifts`). Bytes are
exact where rows and heads divide evenly and every tile has work; otherwise they are an upper bound, since pruned moves are
counted.

Assumptions: work is balanced (zigzag or striped; "contiguous" is bound by the last rank, as under causal masks); blocks are not
cut into parts; a Ulysses exchange overlaps with no compute. What `cost` does not model is not modelled here either.

Compared with the simulation of every rank in `cost.price`, on 2 to 12 ranks: never more than 25 % off, 99 % of the cases within
15 %, and mostly equal where all ranks are alike (mesh, switch, one node). Elsewhere one rank stands for different ones: how far
ranks that hop drift apart, and so hide each other's latency, is an estimate (see `clock`). A tile counts as one kernel call,
although Ulysses over zigzag shards under a causal mask needs several.
No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ringattn.errors import PlanError
from ringattn.planner.closed_form.clock import Clock
from ringattn.planner.closed_form.family import Family, Inner, families
from ringattn.planner.closed_form.rounds import Exchange, Model, Post, Round
from ringattn.planner.closed_form.shifts import Axis, Links
from ringattn.planner.cost import BACKWARD_FLOPS, Cost
from ringattn.planner.topology import Topology
from ringattn.sequence.layout import Span
from ringattn.sequence.mask import Mask
from ringattn.sequence.segments import tile_segments

__all__ = ["Family", "Forecast", "families", "forecast", "rank_families"]


@dataclass(frozen=True)
class Forecast:
    """One member and the costs of its two passes."""

    family: Family
    forward: Cost
    backward: Cost

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def buffer_bytes(self) -> int:
        return max(self.forward.buffer_bytes, self.backward.buffer_bytes)


def rank_families(
    seq_len: int,
    *,
    world: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    mask: Mask,
    topology: Topology,
    batch: int = 1,
    layout: str = "zigzag",
) -> list[Forecast]:
    """Every member of the family for `world` ranks, the fastest first; of equally fast ones, the one with smaller buffers."""
    links, work = Links(topology, world), _Work(seq_len, mask, layout)
    model = Model(heads, kv_heads, head_dim, dtype, batch)
    forecasts = [
        Forecast(family, *(_pass(family, model, work, links, backward=backward) for backward in (False, True)))
        for family in families(world, heads)
    ]
    return sorted(forecasts, key=lambda member: (member.seconds, member.buffer_bytes))


def forecast(
    family: Family,
    *,
    seq_len: int,
    world: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    mask: Mask,
    topology: Topology,
    batch: int = 1,
    backward: bool = False,
    layout: str = "zigzag",
) -> Cost:
    """One pass of one member on `topology`. `layout`: "contiguous" is bound by its last rank, any other is balanced.

    Raises:
        PlanError: the member is not for `world` ranks, or has more Ulysses ranks than there are heads.
    """
    if family.world != world or family.ulysses > heads:
        raise PlanError(f"{family} is for {family.world} ranks and {family.ulysses} heads or more; {world=}, {heads=}")
    model, work = Model(heads, kv_heads, head_dim, dtype, batch), _Work(seq_len, mask, layout)
    return _pass(family, model, work, Links(topology, world), backward=backward)


class _Work:
    """Counts the (query, key) pairs of the busiest rank, once for all members."""

    def __init__(self, seq_len: int, mask: Mask, layout: str) -> None:
        self.seq_len, self._mask, self._layout = seq_len, mask, layout
        self._pairs_from = cache(self._area)

    def pairs(self, ranks: int) -> float:
        if self._layout != "contiguous":
            return self._pairs_from(0) / ranks
        return self._pairs_from((ranks - 1) * self.seq_len // ranks)

    def _area(self, start: int) -> int:
        """Pairs of the queries from `start` on."""
        spans = (Span(start, self.seq_len - start),), (Span(0, self.seq_len),)
        return sum(segment.area for segment in tile_segments(*spans, self._mask))


def _pass(family: Family, model: Model, work: _Work, links: Links, *, backward: bool) -> Cost:
    u, rows = family.ulysses, -(-work.seq_len // family.world)
    inner = Inner(family, model, u * rows, backward=backward)
    exchange = Exchange.of(inner.shares, u, rows, backward=backward, wide=inner.wide)
    flops = 4 * work.pairs(family.inner) * model.head_dim * inner.heads * model.batch * (BACKWARD_FLOPS if backward else 1)
    compute = flops / links.topology.flops
    inputs, results = (u - 1) * exchange.inputs, (u - 1) * exchange.results
    clock = Clock(links, compute / family.inner, inner.merged)
    clock.run([_all_to_all(u, exchange.there)])
    *rounds, last = (round_._replace(buffer_bytes=round_.buffer_bytes + inputs + results) for round_ in inner.rounds(links))
    at_once = sum(nbytes for kind, nbytes in exchange.back.items() if inner.stays(kind))
    back = sum(exchange.back.values())
    buffer_bytes = inputs + results * (at_once < back)
    clock.run([*rounds, last._replace(posts=last.posts + _all_to_all(u, at_once).posts, buffer_bytes=buffer_bytes)])
    clock.run([_all_to_all(u, back - at_once)._replace(buffer_bytes=inputs)])
    link_bytes = max(inner.link_bytes, exchange.there + back)
    link_seconds = link_bytes / links.topology.bandwidth if links.topology.kind == "mesh" else 0.0
    total = inner.sent + (u - 1) * (exchange.there + back)
    return Cost(clock.now, compute, max([link_seconds, *clock.busy.values()]), link_bytes, family.world * total, clock.peak)


def _all_to_all(ranks: int, nbytes: int) -> Round:
    """One round in which every rank sends to all others of its group, without compute."""
    group = Axis(ranks, 1)
    return Round(1, 0, tuple(Post(group, offset, nbytes, 1) for offset in range(1, ranks) if nbytes))
