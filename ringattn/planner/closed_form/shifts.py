"""Computes the load of one shift: every rank sends to the rank `offset` further along its axis, over shared resources.

All traffic of the family consists of such shifts, and every rank takes part in each equally. So the busiest resource of each
class stands for all of them, and its load has a closed form:

    mesh      nothing is shared                                                         a link for every pair
    switch    every port carries one message                                            class "port"
    nodes     ranks whose peer is beyond their node share its uplink, others use ports  classes "uplink", "port"
              with rails a rank has an uplink of its own                                class "uplink r"
    ring      min(offset, size - offset) * stride messages pass every link              classes "up", "down"

Where nodes and grid do not divide each other, nodes differ; the first few and the last are counted, and the busiest stands for
all: exact for few ranks, a sample for many. A port counts as used by every shift of which any message stays inside. No schedule
is known here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from ringattn.errors import PlanError
from ringattn.planner.topology import Topology

SAMPLE = 6  # nodes that are counted, in addition to the last


class Axis(NamedTuple):
    """`size` ranks that are `stride` apart; each run of size * stride adjacent ranks holds `stride` such axes."""

    size: int
    stride: int


class Load(NamedTuple):
    """The load of one shift: seconds per byte on the busiest resource of each class, for all messages and for one."""

    latency: float
    alone: float = 0.0  # on the message's own link, without queueing
    shared: tuple[tuple[str, float, float], ...] = ()


class Links:
    """The loads of shifts among `world` ranks on `topology`."""

    def __init__(self, topology: Topology, world: int) -> None:
        self.topology, self.world = _regular(topology, world), world
        self.load = cache(self._load)
        self.changes = cache(self._changes)

    def _load(self, axis: Axis, offset: int) -> Load:
        t, offset = self.topology, offset % axis.size
        if t.kind == "mesh":
            return Load(t.link_latency, alone=1 / t.bandwidth)
        if t.kind == "switch" or self._one_node:
            return Load(t.link_latency, shared=(("port", 1 / t.bandwidth, 1 / t.bandwidth),))
        return self._around(axis, offset) if t.kind == "ring" else self._between_nodes(axis, offset)

    def _changes(self, axis: Axis) -> tuple[int, ...]:
        """Offsets at which the load differs from that of the offset before."""
        if self.topology.kind == "ring":
            return tuple(range(1, axis.size))
        if self.topology.kind != "nodes" or self._one_node:
            return (1,)
        reach = -(-(self.topology.node_size or 1) // axis.stride)  # an offset this long, in either direction, leaves every node
        low, high = range(1, min(reach, axis.size - 1) + 1), range(max(1, axis.size - reach + 1), axis.size)
        return tuple(sorted({*low, *high}))

    @property
    def _one_node(self) -> bool:
        return self.topology.kind == "nodes" and self.world <= (self.topology.node_size or 1)

    def _around(self, axis: Axis, offset: int) -> Load:
        t, (size, stride) = self.topology, axis
        up, down = offset * stride, (size - offset) * stride
        if size * stride == self.world:  # all messages go in the shorter direction
            way, hops = ("up", up) if up <= down else ("down", down)
            return Load(t.link_latency * hops, shared=((way, hops / t.bandwidth, 1 / t.bandwidth),))
        passing = min(up, down) / t.bandwidth, 1 / t.bandwidth  # most go up, those at the end of the axis go back down
        return Load(t.link_latency * max(up, down), shared=(("up", *passing), ("down", *passing)))

    def _between_nodes(self, axis: Axis, offset: int) -> Load:
        t, size = self.topology, self.topology.node_size or 1
        starts = range(0, self.world, size)
        ends = [(start, min(start + size, self.world)) for start in dict.fromkeys([*starts[:SAMPLE], starts[-1]])]
        staying = [_staying(axis, offset, start, stop) for start, stop in ends]
        leaving = max(stop - start - stay for (start, stop), stay in zip(ends, staying, strict=True))
        port, uplink = 1 / t.bandwidth, 1 / t.uplink_bandwidth
        shared = [("port", port, port)] * (max(staying) > 0)
        if t.uplink_shared and leaving:
            shared.append(("uplink", leaving * uplink, uplink))
        elif leaving:
            for start, stop in ends:
                away = (rank for rank in range(start, stop) if not start <= _peer(axis, offset, rank) < stop)
                shared += [(f"uplink {rank}", uplink, uplink) for rank in away]
        return Load(max(t.link_latency * (max(staying) > 0), t.uplink_latency * (leaving > 0)), shared=tuple(shared))


def _peer(axis: Axis, offset: int, rank: int) -> int:
    place = rank // axis.stride % axis.size
    return rank + ((place + offset) % axis.size - place) * axis.stride


def _staying(axis: Axis, offset: int, start: int, stop: int) -> int:
    """Number of ranks of [start, stop) whose peer is in the same range."""
    block, up, down = axis.size * axis.stride, offset * axis.stride, (axis.size - offset) * axis.stride
    number = 0
    for base in range(start // block * block, stop, block):
        low, high = max(start, base), min(stop, base + block)
        number += max(0, min(base + down, high - up) - low)  # peers further up
        number += max(0, high - max(base + down, low + down))  # peers at the other end, `down` below
    return number


def _regular(topology: Topology, world: int) -> Topology:
    """Replaces a measured matrix, which has no symmetry, by equal links as slow as its slowest, for any number of ranks."""
    if topology.kind == "ring" and topology.world != world:
        raise PlanError(
            f"topology {topology.name!r} is a ring of {topology.world} ranks and world={world}; build one for as many ranks"
        )
    if topology.kind != "matrix":
        return topology
    pairs = [(i, j) for i in range(topology.world or 0) for j in range(topology.world or 0) if i != j]
    slowest = min((topology.bandwidths[i][j] for i, j in pairs), default=1.0)
    kind, bandwidth = ("mesh", slowest) if topology.port is None else ("switch", min(slowest, topology.port))
    latency = max((topology.latencies[i][j] for i, j in pairs), default=0.0)
    plain = replace(topology, kind="mesh", bandwidth=1.0, world=None, latencies=(), bandwidths=(), port=None)
    return replace(plain, kind=kind, link_latency=latency, bandwidth=bandwidth)
