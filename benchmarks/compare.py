"""ringattn's schedules and other libraries' attention in the same run, on the same local kernel, links and rows.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/compare.py --mask full
    python benchmarks/netlab/run.py --kind mesh --hosts 8 --mbit 50 benchmarks/compare.py --emulate 50e9 --schedules ring+u2

Round after round every contender runs once, in an order that rotates, so that a slow minute hits all of them. A run is a
barrier, a forward pass and a backward pass; its time is that of the slowest rank; medians over the rounds are told. With real
compute each contender is first checked against dense attention, and one that is wrong is not timed. With --emulate the
attention kernel only takes its time (see `ringattn.kernels.emulated`), so that more ranks than cores can be run; merging,
packing and every byte on the links stay real. Peers come with: pip install 'ringattn[bench]'.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import tyro
from peers import Attention, Setting, peers
from peers.guard import WRONG, Whole, error, error_of_dense
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn import Plan, RingAttnError, Topology, attention, make_plan
from ringattn.planner import DEFAULT_TOPOLOGY, PRESETS, compute_seconds, price, traffic, transfer_seconds
from ringattn.schedule import NAMES

MASKS = {"full": ringattn.full, "causal": ringattn.causal}


@dataclass(frozen=True)
class Config:
    """What to run."""

    rows: int = 1024
    """Tokens of the sequence on each rank."""
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "bfloat16"
    mask: str = "causal"
    """full or causal"""
    schedules: tuple[str, ...] = ("auto", *NAMES)
    """Ours: names as make_plan takes them; `ring+u2` is a ring with ulysses=2."""
    peers: tuple[str, ...] = ("",)
    """Theirs: those in whose name one of these words occurs. By default all that can run."""
    without: tuple[str, ...] = ()
    """Leave out those in whose name one of these words occurs."""
    rounds: int = 5
    forward_only: bool = False
    emulate: float = 0.0
    """Flop/s of an emulated accelerator, for everyone; 0 computes for real."""
    topology: str | None = None
    """A preset's name or a file written by `ringattn probe`; what our plans and their predictions go by."""
    json: Path | None = None
    """Also write everything here."""


@dataclass
class Contender:
    """`seconds`: (forward, forward and backward) of each round, of this rank and in the end of the slowest."""

    name: str
    attention: Attention
    positions: torch.Tensor
    training: bool  # whether it runs backward
    plan: Plan | None = None
    error: float | None = None
    seconds: list[tuple[float, ...]] = field(default_factory=list)


def main(config: Config) -> None:
    mesh = ringattn.init("gloo", transport="p2p")  # the links that the others use
    rank, world = mesh.get_local_rank(), mesh.size()
    topology = _topology(config)
    unable: dict[str, str] = {}
    contenders = [*_ours(config, world, rank, topology, unable), *_theirs(config, world, rank, unable)]
    if not contenders:
        raise SystemExit("nothing to run: " + "; ".join(f"{name}: {why}" for name, why in unable.items()))
    whole = _whole(config, world)
    dense = None
    if not config.emulate:
        dense = _slowest(error_of_dense(whole, contenders[0].positions, config.mask == "causal"))
        contenders = [c for c in contenders if _is_right(c, whole, config, unable)]
    for round_number in range(config.rounds + 1):
        first = round_number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            seconds = _once(contender, whole)
            if round_number:  # the first round pays for first touches
                contender.seconds.append(seconds)
    for contender in contenders:
        contender.seconds = _slowest_of_each(contender.seconds)
    if rank == 0:
        rows = [_row(contender, topology, config) for contender in contenders]
        _print(rows, unable, dense, topology, config, world)
        if config.json:
            facts = _facts(config, world, topology, dense) | {"contenders": rows, "unable": unable}
            config.json.write_text(json.dumps(facts, indent=1) + "\n")
    dist.destroy_process_group()


def _ours(config: Config, world: int, rank: int, topology: Topology, unable: dict[str, str]) -> Iterator[Contender]:
    """`auto` twice where there is a backward pass: the plan for training, and the one for inference, of which it runs none."""
    wanted = [(name, not config.forward_only) for name in config.schedules]
    if "auto" in config.schedules and not config.forward_only:
        wanted.append(("auto", False))
    for asked, training in wanted:
        schedule, _, ulysses = asked.partition("+u")
        name = f"ringattn {asked}" + ", inference" * (not training and not config.forward_only)
        try:
            plan = make_plan(
                config.rows * world,
                world=world,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                dtype=config.dtype,
                mask=MASKS[config.mask](),
                schedule=schedule,
                ulysses=int(ulysses) if ulysses else None,
                kernel=f"emulated:{config.emulate:g}" if config.emulate else "auto",
                topology=topology,
                training=training,
            )
        except RingAttnError as error:
            unable[name] = str(error)
            continue
        positions = torch.tensor(plan.layout.positions(rank))
        yield Contender(name, partial(attention, plan=plan), positions, training, plan)


def _theirs(config: Config, world: int, rank: int, unable: dict[str, str]) -> Iterator[Contender]:
    causal = config.mask == "causal"
    setting = Setting(world, rank, config.rows, config.heads, config.kv_heads, causal, config.dtype, config.emulate)
    for peer in peers(setting):
        if not any(w in peer.name for w in config.peers) or any(w in peer.name for w in config.without):
            continue
        if why := peer.supports(setting):
            unable[peer.name] = why
            continue
        positions = torch.tensor(peer.layout(setting).positions(rank))
        yield Contender(peer.name, peer.build(setting), positions, not config.forward_only)


def _topology(config: Config) -> Topology:
    """With an emulated accelerator, ranks compute as fast as it does."""
    name = config.topology or DEFAULT_TOPOLOGY
    results = ringattn.load_topology(name) if Path(name).exists() else PRESETS.get(name)
    if results is None:
        raise SystemExit(f"--topology {name}: neither a file nor one of {', '.join(PRESETS)}")
    return replace(results, flops=config.emulate) if config.emulate else results


def _whole(config: Config, world: int) -> Whole:
    """The same on every rank, so that each can cut it as a contender wants it."""
    source = torch.Generator().manual_seed(0)
    heads = (config.heads, config.kv_heads, config.kv_heads, config.heads)
    shapes = [(1, config.rows * world, h, config.head_dim) for h in heads]
    return Whole(*(torch.randn(shape, generator=source).to(getattr(torch, config.dtype)) for shape in shapes))


def _is_right(contender: Contender, whole: Whole, config: Config, unable: dict[str, str]) -> bool:
    causal = config.mask == "causal"
    contender.error = _slowest(error(contender.attention, whole, contender.positions, causal, contender.training))
    if not contender.error < WRONG:
        unable[contender.name] = f"wrong: differs from dense attention by {contender.error:.1%}"
    return contender.error < WRONG


def _once(contender: Contender, whole: Whole) -> tuple[float, float]:
    """This rank's seconds from a common start to the end of forward, and to the end of backward."""
    *leaves, dout = whole.rows(contender.positions)
    q, k, v = (x.requires_grad_(contender.training) for x in leaves)
    dist.barrier()
    begin = perf_counter()
    out = contender.attention(q, k, v)
    forward = perf_counter() - begin
    if contender.training:
        out.backward(dout)
    return forward, perf_counter() - begin


def _slowest(value: float) -> float:
    return _slowest_of_each([(value,)])[0][0]


def _slowest_of_each(values: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The largest that any rank has, in each place; NaN counts as the largest."""
    table = torch.tensor(values, dtype=torch.float64).nan_to_num_(nan=torch.inf)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [tuple(row) for row in table.tolist()]


def _row(contender: Contender, topology: Topology, config: Config) -> dict[str, object]:
    plan, medians = contender.plan, list(map(median, zip(*contender.seconds, strict=True)))
    row: dict[str, object] = dict(name=contender.name, ours=plan is not None, error=contender.error)
    for count, passes in ((1, "forward"), (2, "both"))[: 1 + contender.training]:
        row[passes] = medians[count - 1]
        if plan is not None:
            backwards = (False, True)[:count]
            row[f"predicted_{passes}"] = sum(price(plan, topology, backward=backward).seconds for backward in backwards)
            row[f"bound_{passes}"] = sum(_bound(plan, topology, backward) for backward in backwards)
    if plan is not None:
        row["plan"] = str(plan)
    return row | dict(seconds=contender.seconds)


def _bound(plan: Plan, topology: Topology, backward: bool) -> float:
    """Seconds that compute, or the busiest link for its bytes, needs alone."""
    transfer = transfer_seconds(traffic(plan, backward=backward), topology)
    return max(compute_seconds(plan, topology, backward=backward), transfer)


def _print(
    rows: list[dict[str, Any]], unable: dict[str, str], dense: float | None, topology: Topology, config: Config, world: int
) -> None:
    passes = ["forward"] if config.forward_only else ["forward", "both"]
    fastest = {p: min((row[p] for row in rows if not row["ours"] and p in row), default=None) for p in passes}
    compute = f"an emulated accelerator of {config.emulate:g} flop/s a rank" if config.emulate else "real compute"
    table = Table(
        title=f"{config.rows} rows on each of {world} ranks, {config.heads} heads over {config.kv_heads} of {config.head_dim}, "
        f"{config.dtype}, {config.mask}, {compute}",
        caption=f"median of {config.rounds}, slowest rank; predicted for {topology.name}"
        + (f"; error of dense {config.dtype} attention {dense:.2%}" if dense is not None else ""),
    )
    table.add_column("")
    for head in ("forward", "forward+backward")[: len(passes)]:
        for column in (head, "predicted", "fastest peer / this"):
            table.add_column(column, justify="right")
    table.add_column("error", justify="right")
    for row in rows:
        cells = []
        for p in passes:
            predicted, peer, seconds = row.get(f"predicted_{p}"), fastest[p], row.get(p)
            cells += [_ms(seconds), _ms(predicted), f"{peer / seconds:.2f} x" if peer and seconds else ""]
        table.add_row(row["name"], *cells, "" if row["error"] is None else f"{row['error']:.2%}")
    console = Console(width=160)
    console.print(table)
    for name, why in unable.items():
        console.print(f"not run: {name}: {why}", markup=False, highlight=False)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.{1 if seconds > 0.01 else 3}f} ms"


def _facts(config: Config, world: int, topology: Topology, dense: float | None) -> dict[str, object]:
    packages = ("ringattn", "torch", "ring-flash-attn", "yunchang", "deepspeed", "ring-attention-pytorch")
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=" ".join(sys.argv),
        config=asdict(config) | {"json": str(config.json)},
        world=world,
        topology=asdict(topology),
        emulated=bool(config.emulate),
        error_of_dense=dense,
        versions={package: _version(package) for package in packages},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except RingAttnError as problem:
        raise SystemExit(str(problem)) from None
