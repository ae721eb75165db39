"""What a pass costs at any number of ranks, without a schedule: 4,096 ranks in milliseconds.

Every member of the family (`family`) is symmetric: all ranks do the same at the same time, so one rank on a clock (`clock`)
stands for all, steps come in long equal runs (`rounds`), and links are loaded by whole shifts (`shifts`). Bytes are exact for
rows that divide evenly and a mask that leaves every tile some work; else an upper bound, since pruned moves are counted.

What it takes for granted: work is balanced (zigzag or striped; "contiguous" is bound by the last rank, as under causal masks);
blocks are whole, not cut into parts; a Ulysses exchange hides behind nothing. What `cost` leaves out is left out here too.

Measured against `cost.price` on 2 to 12 ranks (`tests/test_forecast.py` has the limits): on a mesh and a switch the
same to a few percent; where ranks are not alike (nodes, ring) one rank that waits for the busiest link at every step is a little
slower than many that wait only for their own. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringattn.cost import BACKWARD_FLOPS, Cost
from ringattn.errors import PlanError
from ringattn.forecast.clock import Clock
from ringattn.forecast.family import Family, families
from ringattn.forecast.inner import Inner
from ringattn.forecast.payloads import Exchange, Model
from ringattn.forecast.rounds import Post, Round
from ringattn.forecast.shifts import Axis, Links
from ringattn.layout import Span
from ringattn.mask import Mask
from ringattn.pieces import pieces
from ringattn.topology import Topology

__all__ = ["Family", "Forecast", "families", "forecast", "rank_families"]


@dataclass(frozen=True)
class Forecast:
    """One member and what its two passes cost."""

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
    """Every member of the family for `world` ranks, the fastest first; of equally fast ones, the one that holds less."""
    links, work = Links(topology, world), _Work(seq_len, mask, layout)
    model = Model(heads, kv_heads, head_dim, dtype, batch)
    found = [
        Forecast(family, *(_pass(family, model, work, links, backward=backward) for backward in (False, True)))
        for family in families(world, heads)
    ]
    return sorted(found, key=lambda one: (one.seconds, one.buffer_bytes))


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
        PlanError: the member is not for `world` ranks, or its Ulysses degree does not go with the heads.
    """
    if family.world != world or family.ulysses > heads:
        raise PlanError(f"{family} is for {family.world} ranks and {family.ulysses} heads or more; {world=}, {heads=}")
    model, work = Model(heads, kv_heads, head_dim, dtype, batch), _Work(seq_len, mask, layout)
    return _pass(family, model, work, Links(topology, world), backward=backward)


@dataclass(frozen=True)
class _Work:
    seq_len: int
    mask: Mask
    layout: str

    def pairs(self, ranks: int) -> float:
        """(Query, key) pairs of the busiest of `ranks`."""
        if self.layout != "contiguous":
            return _area(self.mask, 0, self.seq_len) / ranks
        return _area(self.mask, (ranks - 1) * self.seq_len // ranks, self.seq_len)


@lru_cache(maxsize=64)
def _area(mask: Mask, start: int, stop: int) -> int:
    """Kept pairs of the queries [start, stop) with all keys before `stop`: all there are when it is the end."""
    return sum(piece.area for piece in pieces((Span(start, stop - start),), (Span(0, stop),), mask))


def _pass(family: Family, model: Model, work: _Work, links: Links, *, backward: bool) -> Cost:
    u, rows = family.ulysses, -(-work.seq_len // family.world)
    (share,) = model.shares(u)
    flops = 4 * work.pairs(family.inner) * model.head_dim * share.heads * model.batch * (BACKWARD_FLOPS if backward else 1)
    compute = flops / links.topology.flops
    inner = Inner(family, model, u * rows, backward=backward)
    exchange = Exchange.of(inner.shares, u, rows, backward=backward, wide=inner.wide)
    clock = Clock(links, compute / family.inner)
    clock.run(_all_to_all(u, exchange.there))
    clock.run(one._replace(held=one.held + exchange.kept) for one in inner.rounds(links))
    clock.run(_all_to_all(u, exchange.back))
    link_bytes = max(inner.link_bytes, exchange.there + exchange.back if u > 1 else 0)
    alone = link_bytes / links.topology.bandwidth if links.topology.kind == "mesh" else 0.0
    total = inner.sent + (u - 1) * (exchange.there + exchange.back)
    return Cost(clock.now, compute, max([alone, *clock.busy.values()]), link_bytes, family.world * total, clock.peak)


def _all_to_all(ranks: int, nbytes: int) -> list[Round]:
    """Everything at once, and nothing meanwhile."""
    group = Axis(ranks, 1)
    return [Round(1, 0, tuple(Post(group, offset, nbytes, 1) for offset in range(1, ranks)))]
