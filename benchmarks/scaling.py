"""How attention scales with ranks: measured on the ranks at hand, predicted beside it, and the model's curve beyond.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/scaling.py --probe --plot scaling.svg --json scaling.json

Strong scaling cuts one sequence over ever more ranks, weak scaling gives every rank as many rows. The first 1, 2, 4, ... ranks
run while the others wait. Times are medians over rounds, from a common start until the slowest rank is done. Efficiency is
useful flop/s for each rank, as a share of those on the fewest ranks: the same for both kinds, also under a causal mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import tyro
from scaling_report import Point, chosen, curves, draw, print_table
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn import Plan, RingAttnError, Topology, attention, make_plan
from ringattn.planner import DEFAULT_TOPOLOGY, PRESETS, price, rank_families

MASKS = {"full": ringattn.full, "causal": ringattn.causal}
PATIENCE = 3600.0  # seconds that ranks wait for the others' turn


@dataclass(frozen=True)
class Config:
    """What to run."""

    seq_lens: tuple[int, ...] = (4096,)
    """Strong scaling: tokens of the whole sequence. None with --seq-lens alone."""
    rows: tuple[int, ...] = (1024,)
    """Weak scaling: tokens for each rank. None with --rows alone."""
    fewest: int = 1
    """Begin with so many ranks, where a sequence is too long for one."""
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    mask: str = "causal"
    """full or causal"""
    schedules: tuple[str, ...] = ("auto",)
    """As make_plan takes them."""
    topology: str | None = None
    """A preset's name or a file written by `ringattn probe`; what `auto` and the predictions go by."""
    probe: bool = False
    """Measure the topology first, in place of naming one."""
    emulate: float = 0.0
    """Flop/s of an emulated accelerator in place of the attention kernel; 0 computes for real."""
    rounds: int = 5
    beyond: int = 256
    """Ranks up to which the model's curve goes; it is left out where that is not more than there are."""
    plot: Path | None = None
    """Write curves to this .png, .svg or .pdf."""
    json: Path | None = None
    """Also write the figures here."""


def main(config: Config) -> None:
    mesh = ringattn.init(timeout=PATIENCE)
    rank, world = mesh.get_local_rank(), mesh.size()
    topology = _topology(config, mesh)
    points: list[Point] = []
    sizes = {world, *(config.fewest << n for n in range(world.bit_length()) if config.fewest << n <= world)}
    # From the top: a new group is named by how many its ranks are in already, which must be as many for each of them.
    for ranks in sorted(sizes, reverse=True):
        group = dist.new_group(range(ranks))
        for scaling, length in _kinds(config):
            for schedule in config.schedules if rank < ranks else ():
                points.append(_measure(config, scaling, length, schedule, ranks, topology, group, mesh.device_type))
        dist.barrier()
    if rank == 0:
        print_table(points, f"{_model(config)}; predictions for {topology.name}")
        points += [point for line in curves(points) for point in _beyond(line[-1], config, topology)]
        if config.json:
            facts = {"config": asdict(config), "world": world, "device": mesh.device_type, "torch": torch.__version__}
            facts |= {"topology": asdict(topology), "points": [asdict(point) for point in points]}
            config.json.write_text(json.dumps(facts, indent=1, default=str) + "\n")
        if config.plot:
            draw(curves(points), config.plot, f"{_model(config)}; model: {topology.name}")
    dist.barrier()
    dist.destroy_process_group()


def _kinds(config: Config) -> Iterator[tuple[str, int]]:
    yield from (("strong", tokens) for tokens in config.seq_lens)
    yield from (("weak", rows) for rows in config.rows)


def _topology(config: Config, mesh: DeviceMesh) -> Topology:
    """With an emulated accelerator, ranks compute as fast as it does."""
    if config.probe:
        from ringattn.diagnostics import Probe

        results = Probe(mesh).topology("probed")
    else:
        name = config.topology or DEFAULT_TOPOLOGY
        results = ringattn.load_topology(name) if name not in PRESETS else PRESETS[name]
    return replace(results, flops=config.emulate) if config.emulate else results


def _of(topology: Topology, ranks: int) -> Topology:
    """What the first `ranks` have of it; a physical ring counts as long as there are ranks."""
    if topology.kind == "ring":
        return replace(topology, world=ranks)
    if topology.kind == "matrix" and ranks < (topology.world or 0):
        latencies, bandwidths = (
            tuple(row[:ranks] for row in matrix[:ranks]) for matrix in (topology.latencies, topology.bandwidths)
        )
        return replace(topology, world=ranks, latencies=latencies, bandwidths=bandwidths)
    return topology


def _measure(
    config: Config, scaling: str, length: int, schedule: str, ranks: int, whole: Topology, group: dist.ProcessGroup, device: str
) -> Point:
    tokens, topology = length * (ranks if scaling == "weak" else 1), _of(whole, ranks)
    kernel = f"emulated:{config.emulate:g}" if config.emulate else "auto"
    plan = make_plan(tokens, world=ranks, **_shape(config), schedule=schedule, kernel=kernel, topology=topology)
    rounds = [_once(plan, config, group, device) for _ in range(config.rounds + 1)][1:]  # the first pays for first touches
    forward, both = map(median, zip(*rounds, strict=True))
    costs = [price(plan, topology, batch=config.batch, backward=backward).seconds for backward in (False, True)]
    pairs = _pairs(config, tokens)
    return Point(scaling, length, schedule, ranks, tokens, pairs, chosen(plan), (forward, both), (costs[0], sum(costs)))


def _shape(config: Config) -> dict[str, Any]:
    given: dict[str, Any] = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
    }
    return given | {"mask": MASKS[config.mask]()}


def _pairs(config: Config, tokens: int) -> float:
    return tokens * (tokens + 1) / 2 if config.mask == "causal" else float(tokens) ** 2


def _once(plan: Plan, config: Config, group: dist.ProcessGroup, device: str) -> tuple[float, float]:
    """Seconds of a forward pass, and of forward and backward together."""

    def subset(heads: int) -> torch.Tensor:
        shape = (config.batch, plan.rows(dist.get_rank(group)), heads, config.head_dim)
        return torch.randn(shape, dtype=getattr(torch, config.dtype), device=device, requires_grad=True)

    q, k, v = subset(config.heads), subset(config.kv_heads), subset(config.kv_heads)
    begin = _now(group, device)
    with torch.no_grad():
        attention(q, k, v, plan, group=group)
    middle = _now(group, device)
    out = attention(q, k, v, plan, group=group)
    out.backward(torch.ones_like(out))
    return middle - begin, _now(group, device) - middle


def _now(group: dist.ProcessGroup, device: str) -> float:
    """The time when all ranks of the group have come here."""
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group)
    return perf_counter()


def _beyond(last: Point, config: Config, topology: Topology) -> Iterator[Point]:
    """The model's curve from the last measured number of ranks on: the best member of the family, or of that name."""
    ranks = last.ranks
    while ranks <= config.beyond and last.ranks < config.beyond:
        tokens = last.length * (ranks if last.scaling == "weak" else 1)
        every = rank_families(tokens, world=ranks, **_shape(config), topology=_of(topology, ranks), batch=config.batch)
        named = [entry for entry in every if entry.family.name == last.schedule and entry.family.ulysses == 1] or every
        seconds = named[0].forward.seconds, named[0].seconds
        unrun = replace(last, measured=None, chosen=str(named[0].family), predicted=seconds)
        yield replace(unrun, ranks=ranks, tokens=tokens, pairs=_pairs(config, tokens))
        ranks *= 2


def _model(config: Config) -> str:
    kernel = f", kernel emulated at {config.emulate:.3g} flop/s" if config.emulate else ""
    return f"{config.heads} heads over {config.kv_heads} of {config.head_dim}, {config.dtype}, {config.mask}{kernel}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except RingAttnError as error:
        raise SystemExit(str(error)) from None
