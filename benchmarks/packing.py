"""Packed documents of mixed lengths: as they are, and padded each to a multiple of 2 * ranks, as other libraries' zigzag asks.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/packing.py --tokens 8192

ring-flash-attn's `zigzag_ring_flash_attn_varlen_func` cuts every document into 2 * ranks equal chunks, so each must be
a multiple of that. "padded" is that layout under ring attention, run by ringattn itself, so that the two differ in nothing
but the padding and the plan; "ours" is what the planner makes of the documents. Both are run in turn, round after round; times
are medians of the slowest rank. Tokens and (query, key) pairs are those that are computed, on the busiest rank and together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn import Layout, Plan, RingAttnError, attention, make_plan
from ringattn.planner import traffic
from ringattn.sequence import Span


@dataclass(frozen=True)
class Config:
    """What to run."""

    tokens: int = 8192
    """In all documents together, without padding."""
    shortest: int = 16
    """Lengths are drawn from a Pareto distribution that begins here: most are short, a few very long."""
    longest: int = 4096
    seed: int = 0
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "bfloat16"
    topology: str | None = "cpu"
    """A preset's name or a file written by `ringattn probe`."""
    rounds: int = 5
    json: Path | None = None
    """Also write the figures here."""


@dataclass
class Contender:
    """`seconds`: (forward, forward and backward) of each round, of the slowest rank."""

    name: str
    plan: Plan
    seconds: list[tuple[float, float]]


def main(config: Config) -> None:
    mesh = ringattn.init("gloo", transport="p2p")  # the links that the others use
    rank, world = mesh.get_local_rank(), mesh.size()
    lengths = _lengths(config)
    padded = [-(-length // (2 * world)) * 2 * world for length in lengths]
    contenders = [
        Contender("ours", _plan(config, lengths, world), []),
        Contender("padded", _plan(config, padded, world, layout=_zigzag(padded, world), schedule="ring"), []),
    ]
    for round_number in range(config.rounds + 1):
        for contender in contenders[:: -1 if round_number % 2 else 1]:
            seconds = _once(contender.plan, config, rank)
            if round_number:  # the first round pays for first touches
                contender.seconds.append(seconds)
    if rank == 0:
        _print(contenders, lengths, config, world)
    dist.destroy_process_group()


def _lengths(config: Config) -> list[int]:
    source, results, left = Random(config.seed), [], config.tokens
    while left:
        results.append(min(left, config.longest, int(config.shortest * source.paretovariate(0.8))))
        left -= results[-1]
    return results


def _zigzag(lengths: list[int], world: int) -> Layout:
    """Every document cut into 2 * world equal chunks, of which rank r has number r and number 2 * world - 1 - r."""
    shards: list[list[Span]] = [[] for _ in range(world)]
    for start, stop in pairwise((0, *accumulate(lengths))):
        size = (stop - start) // (2 * world)
        for rank, shard in enumerate(shards):
            shard += [Span(start + rank * size, size), Span(stop - (rank + 1) * size, size)]
    return Layout("zigzag of every document", tuple(map(tuple, shards)))


def _plan(config: Config, lengths: list[int], world: int, **given: Any) -> Plan:
    topology = config.topology
    results = ringattn.load_topology(topology) if topology and Path(topology).exists() else topology
    model: dict[str, Any] = dict(heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=config.dtype)
    mask = ringattn.documents((0, *accumulate(lengths)))
    return make_plan(sum(lengths), world=world, **model, mask=mask, topology=results, **given)


def _once(plan: Plan, config: Config, rank: int) -> tuple[float, float]:
    def subset(heads: int) -> torch.Tensor:
        return torch.randn(1, plan.rows(rank), heads, config.head_dim, dtype=getattr(torch, config.dtype), requires_grad=True)

    q, k, v = subset(config.heads), subset(config.kv_heads), subset(config.kv_heads)
    dist.barrier()
    begin = perf_counter()
    out = attention(q, k, v, plan)
    forward = perf_counter() - begin
    out.backward(torch.ones_like(out))
    slowest = torch.tensor([forward, perf_counter() - begin], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest[0].item(), slowest[1].item()


def _figures(contender: Contender) -> dict[str, float]:
    plan = contender.plan
    pairs = sum(area for head_group in plan.forward[:1] for area in head_group.areas.values())
    forward, both = map(median, zip(*contender.seconds, strict=True))
    return dict(
        tokens=plan.seq_len,
        busiest_tokens=max(plan.rows(rank) for rank in range(plan.world)),
        pairs=pairs,
        balance=plan.balance,
        sent=sum(sum(traffic(plan, backward=backward).values()) for backward in (False, True)),
        forward=forward,
        both=both,
    )


def _print(contenders: list[Contender], lengths: list[int], config: Config, world: int) -> None:
    table = Table(title=f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens on {world} ranks, {config.dtype}")
    for head in ("", "tokens", "busiest rank's", "pairs", "busiest / mean", "MB sent", "forward", "forward+backward", "plan"):
        table.add_column(head, justify="left" if head in ("", "plan") else "right")
    results = {contender.name: _figures(contender) for contender in contenders}
    for contender in contenders:
        f = results[contender.name]
        table.add_row(
            contender.name,
            f"{f['tokens']:,}",
            f"{f['busiest_tokens']:,}",
            f"{f['pairs']:,}",
            f"{f['balance']:.2f}",
            f"{f['sent'] / 1e6:.2f}",
            f"{f['forward'] * 1e3:.1f} ms",
            f"{f['both'] * 1e3:.1f} ms",
            f"{contender.plan.layout}; {contender.plan.labels[0]}",
        )
    ours, padded = results["ours"], results["padded"]
    ratios = ", ".join(f"{what} {padded[what] / max(ours[what], 1e-12):.2f}" for what in ("tokens", "pairs", "forward", "both"))
    console = Console(width=170)
    console.print(table)
    console.print(f"padded / ours: {ratios}")
    if config.json:
        facts = dict(
            config=asdict(config) | {"json": None}, world=world, torch=torch.__version__, lengths=lengths, rows=results
        )
        config.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except RingAttnError as error:
        raise SystemExit(str(error)) from None
