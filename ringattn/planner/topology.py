"""Describes the links between ranks as data: how long a message waits, and what it shares with other messages.

    mesh     every directed pair of ranks has a link of its own               NVLink or HCCS between all pairs
    switch   each rank has one port out and one in, shared by all its peers   NVSwitch, one NIC a rank, PCIe
    nodes    switches of `node_size` ranks; messages leaving a node share one uplink, those entering it another
    ring     only neighbours have links; others are reached by the shorter way round, upwards where both are as long
    matrix   what `ringattn probe` measured: a link for every directed pair and, if links are shared, a port for every rank

`route` lists the shared resources that a message from one rank to another occupies, with the speed of each. `cost` uses nothing
else, so a new kind of machine needs only a new `route`. Distance, congestion and protocol are not modelled further: a message
takes latency + bytes / bandwidth when it has its route to itself.

Units: seconds, bytes per second, floating-point operations per second. No torch here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from ringattn._validation import as_finite_float, count, flag, number, one_of, short_repr, text
from ringattn._validation import path as path_of
from ringattn.errors import PlanError

KINDS = ("mesh", "switch", "nodes", "ring", "matrix")
FORMAT, VERSION = "ringattn topology", 1

Matrix: TypeAlias = tuple[tuple[float, ...], ...]
Resource: TypeAlias = tuple[str, int, int]  # ("link", src, dst) or (which port, rank or node, 0)
Route: TypeAlias = tuple[tuple[Resource, float], ...]


@dataclass(frozen=True)
class Topology:
    """Links between ranks. Frozen and hashable, since plans are cached by it.

    Attributes:
        name: for people; plans name it with their predictions.
        kind: one of `KINDS`.
        link_latency: seconds that a message takes in addition to its bytes.
        bandwidth: bytes/s of a link (mesh, ring) or of a rank's port in each direction (switch, nodes). Full duplex.
        flops: attention flop/s that one rank sustains in the forward pass.
        launch: seconds that a kernel call, or posting a message, takes in addition to its work.
        memory: bytes/s at which a rank merges partial results and packs messages.
        node_size: ranks in a node (nodes).
        uplink_latency, uplink_bandwidth: between nodes, in each direction.
        uplink_shared: whether all ranks of a node share one uplink; if not, each has one of that bandwidth (rails).
        world: the number of ranks it describes (ring and matrix); None: any number.
        latencies, bandwidths: `[src][dst]`, measured (matrix); the diagonal is not read.
        port: bytes/s that all links of a rank share in each direction (matrix); None: links are independent.
    """

    name: str
    kind: str
    flops: float
    link_latency: float = 0.0
    bandwidth: float = 0.0
    node_size: int | None = None
    uplink_latency: float = 0.0
    uplink_bandwidth: float = 0.0
    uplink_shared: bool = True
    world: int | None = None
    latencies: Matrix = ()
    bandwidths: Matrix = ()
    port: float | None = None
    launch: float = 0.0
    memory: float = 1e15

    def __post_init__(self) -> None:
        about = f"topology {short_repr(self.name)}: "
        text(f"{about}name", self.name, PlanError)
        one_of(f"{about}kind", self.kind, KINDS, PlanError)
        flag(f"{about}uplink_shared", self.uplink_shared, PlanError)
        for name in ("world", "node_size"):
            if getattr(self, name) is not None:
                count(f"{about}{name}", getattr(self, name), PlanError)
        for name in ("latencies", "bandwidths"):
            if not _is_matrix(getattr(self, name)):
                raise PlanError(f"{about}{name}={short_repr(getattr(self, name))}; must be a tuple of tuples of numbers")
        measured = self.kind == "matrix"
        self._require("flops", "bandwidth" if not measured else "port")
        if self.kind in ("ring", "matrix") and (self.world is None or self.world < 1):
            raise PlanError(
                f"topology {self.name!r}: world={self.world}; a {self.kind} topology needs the number of ranks it describes"
            )
        if self.kind == "nodes":
            self._require("uplink_bandwidth", "node_size")
        if measured:
            self._require_square("latencies", self.latencies, least=0.0)
            self._require_square("bandwidths", self.bandwidths, least=1.0)

    def latency(self, src: int, dst: int) -> float:
        """Seconds until the first byte from `src` arrives at `dst`."""
        self._check_ranks(src, dst)
        if self.kind == "matrix":
            return self.latencies[src][dst]
        if self.kind == "ring":
            return self.link_latency * len(self._hops(src, dst))
        return self.link_latency if self._same_node(src, dst) else self.uplink_latency

    def route(self, src: int, dst: int) -> Route:
        """The resources that a message from `src` to `dst` occupies, each with its bandwidth in bytes/s."""
        self._check_ranks(src, dst)
        if (src, dst) not in self._routes:
            self._routes[src, dst] = tuple(self._find_route(src, dst))
        return self._routes[src, dst]

    def _check_ranks(self, src: int, dst: int) -> None:
        for name, rank in (("src", src), ("dst", dst)):
            if not isinstance(rank, int) or rank < 0 or (self.world is not None and rank >= self.world):
                valid = "from 0 on" if self.world is None else f"0 to {self.world - 1}"
                raise PlanError(f"topology {self.name!r}: {name}={short_repr(rank)}; ranks are whole numbers, {valid}")

    @cached_property
    def _routes(self) -> dict[tuple[int, int], Route]:
        return {}

    def _find_route(self, src: int, dst: int) -> list[tuple[Resource, float]]:
        if self.kind == "mesh":
            return [(("link", src, dst), self.bandwidth)]
        if self.kind == "ring":
            return [(("link", a, b), self.bandwidth) for a, b in self._hops(src, dst)]
        if self.kind == "matrix":
            ports: list[tuple[Resource, float]] = []
            if self.port is not None:
                ports = [(("out", src, 0), self.port), (("in", dst, 0), self.port)]
            return [(("link", src, dst), self.bandwidths[src][dst]), *ports]
        if self._same_node(src, dst):
            return [(("out", src, 0), self.bandwidth), (("in", dst, 0), self.bandwidth)]
        size = (self.node_size or 1) if self.uplink_shared else 1
        return [(("up", src // size, 0), self.uplink_bandwidth), (("down", dst // size, 0), self.uplink_bandwidth)]

    def _same_node(self, src: int, dst: int) -> bool:
        return self.kind != "nodes" or src // (self.node_size or 1) == dst // (self.node_size or 1)

    def _hops(self, src: int, dst: int) -> list[tuple[int, int]]:
        """The hops of the shorter direction around the ring."""
        world = self.world or 1
        up = (dst - src) % world
        turn, hops = (1, up) if up <= world - up else (-1, world - up)
        stops = [(src + turn * n) % world for n in range(hops + 1)]
        return list(pairwise(stops))

    def save(self, path: str | Path) -> None:
        """Writes it as JSON with a format name and a version, for `load_topology`."""
        document = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"
        try:
            path_of("path", path, PlanError).write_text(document)
        except OSError as error:
            raise PlanError(f"topology {self.name!r} cannot be written to {path} ({error}); pass another path") from error

    def _require(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if name == "port" and value is None:
                continue
            if (as_finite_float(value) or 0) <= 0:
                raise PlanError(
                    f"topology {self.name!r}: {name}={short_repr(value)}; a {self.kind} topology needs it positive and finite"
                )
        number(f"topology {self.name!r}: memory", self.memory, PlanError, above=0)
        for name in ("bandwidth", "uplink_bandwidth", "link_latency", "uplink_latency", "launch"):
            number(f"topology {self.name!r}: {name}", getattr(self, name), PlanError, least=0)

    def _require_square(self, name: str, matrix: Matrix, *, least: float) -> None:
        world = self.world or 0
        if len(matrix) != world or any(len(row) != world for row in matrix):
            raise PlanError(
                f"topology {self.name!r}: {name} must have {world} rows of {world} numbers, one for each pair of ranks"
            )
        for src, row in enumerate(matrix):
            for dst, value in enumerate(row):
                if src != dst and value < least:
                    raise PlanError(f"topology {self.name!r}: {name}[{src}][{dst}]={value!r}; must be at least {least:g}")


def _is_matrix(rows: object) -> bool:
    return isinstance(rows, tuple) and all(isinstance(row, tuple) and None not in map(as_finite_float, row) for row in rows)


def load_topology(path: str | Path) -> Topology:
    """Reads a topology that `ringattn probe` or `Topology.save` wrote.

    Raises:
        PlanError: the file is missing, damaged, of another format or version, or has invalid values.
    """
    path = path_of("path", path, PlanError)
    hint = f"measure one with `torchrun --nproc-per-node N -m ringattn probe --out {path}` or name one of {', '.join(PRESETS)}"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"topology file {path} cannot be read ({error}); {hint}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise PlanError(f"{path} is not a topology file (no format {FORMAT!r} in it); {hint}")
    version = data.pop("version", None)
    if version != VERSION:
        raise PlanError(f"topology file {path} has version {short_repr(version)} and this ringattn reads {VERSION}; {hint}")
    try:
        return _from_json(data)
    except (PlanError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"topology file {path} is damaged: {error}; {hint}") from error


def _from_json(data: dict[str, Any]) -> Topology:
    unknown = set(data) - {field.name for field in fields(Topology)}
    if unknown:
        raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
    for name in ("latencies", "bandwidths"):
        data[name] = tuple(tuple(float(value) for value in row) for row in data.get(name, ()))
    return Topology(**data)


def _preset(name: str, kind: str, *, latency: float, bandwidth: float, flops: float, **more: Any) -> Topology:
    return Topology(name, kind, flops, latency, bandwidth, **more)


# What programs reach, not what data sheets promise: about 80 % of the line rate, attention at about half of the peak flop/s.
# Latency is that of one point-to-point message through NCCL, HCCL or gloo; `memory` is two thirds of the data sheet's.
PRESETS: dict[str, Topology] = {
    topology.name: topology
    for topology in (
        # PCIe 4.0 x16 carries 32 GB/s each way through the one slot of a card, for any peer; bf16 cards of 125 Tflop/s.
        _preset("pcie", "switch", latency=15e-6, bandwidth=22e9, flops=60e12, launch=15e-6, memory=600e9),
        # Four A100 with four NVLink3 lanes of 25 GB/s between each pair; FlashAttention-2 reaches 190 of 312 Tflop/s there.
        _preset("nvlink", "mesh", latency=8e-6, bandwidth=80e9, flops=190e12, launch=12e-6, memory=1.2e12),
        # H100: 18 NVLink4 lanes of 25 GB/s into NVSwitch; FlashAttention-2 and cuDNN sustain 350 to 450 of 989 Tflop/s.
        _preset("nvswitch", "switch", latency=8e-6, bandwidth=360e9, flops=400e12, launch=10e-6, memory=2.2e12),
        # The same eight GPUs, and one NDR port of 400 Gbit/s for all of them.
        _preset(
            "infiniband",
            "nodes",
            latency=8e-6,
            bandwidth=360e9,
            flops=400e12,
            launch=10e-6,
            memory=2.2e12,
            node_size=8,
            uplink_latency=15e-6,
            uplink_bandwidth=45e9,
        ),
        # A host for every rank, 100 Gbit/s, TCP: kernel sockets cost tens of microseconds and some of the rate.
        _preset("ethernet", "switch", latency=50e-6, bandwidth=10e9, flops=60e12, launch=15e-6, memory=600e9),
        # Ascend 910B, eight to a node: vendor's 56 GB/s both ways on each of seven HCCS links, 320 Tflop/s in fp16.
        _preset("hccs", "mesh", latency=15e-6, bandwidth=23e9, flops=150e12, launch=20e-6, memory=1e12),
        # Processes on one host over loopback: a copy through the kernel, and one core for the attention of each rank in fp32.
        _preset("cpu", "switch", latency=80e-6, bandwidth=1.5e9, flops=60e9, launch=2e-4, memory=8e9),
    )
}
# As "infiniband", with a port for each GPU, like most H100 clusters.
PRESETS["rails"] = replace(PRESETS["infiniband"], name="rails", uplink_shared=False)
