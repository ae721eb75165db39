"""From which sequence length on merging pays, by policy: what the blocks behind it save, and what it costs itself.

    OMP_NUM_THREADS=1 python benchmarks/compression/pays.py

One rank, fp32, forward and backward. Per policy and length, each round with a new input: one block on all rows, the same block
on the groups, and merging's own parts: `decide` (from rows to a merge), `shorten` (routes and the plan; a merge by content has
new counts, so mostly a new plan), `merge` and `unmerge` with their backward. Cases take turns inside a round; medians. Last,
what a plan for new counts takes on more ranks: of a causal mask and a given layout, as `shorten` asks for it.
What this does not show: what merging does to the loss (smollm2.py, trained.py), or bytes between ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringattn import Plan, causal, full, make_plan
from ringattn.merging import DeleteGate, Merge, bipartite, delete, segments, shorten, similar, windows
from ringattn.nn import Block, DecoderConfig

SHAPE = DecoderConfig(256, 256, 1, 4, 4, 64, 768)
PARTS = ("decide", "shorten", "merge", "unmerge")
BUCKET = 64


@dataclass(frozen=True)
class Config:
    """What to time."""

    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    rounds: int = 9
    json: Path = Path("benchmarks/results/compression_pays.json")


def _decisions(plan: Plan, gate: DeleteGate) -> dict[str, Callable[[Tensor], Merge]]:
    """From rows (1, N, dim) to a merge that leaves about half of them. 16 of 64 channels stand for keys."""
    length, layout = plan.seq_len, plan.layout
    return {
        "windows 2": lambda x: windows(length, 2),
        "words": lambda x: segments(x[..., 0] > 0),
        "similar": lambda x: similar(x[..., :64], layout, window=16, remove=0.5),
        "similar, PiToMe": lambda x: similar(x[..., :64], layout, window=16, remove=0.5, scorer="energy"),
        "delete": lambda x: delete(gate.keeps(gate(x)), layout),
        "bipartite": lambda x: bipartite(x[..., :64], layout, remove=0.5),
    }


def main(config: Config) -> None:
    torch.manual_seed(0)
    block, gate = Block(SHAPE), DeleteGate(SHAPE.dim)
    torch.nn.init.normal_(gate.weight, std=SHAPE.dim**-0.5)
    torch.nn.init.zeros_(gate.bias)
    rows: list[dict[str, Any]] = []
    for length in config.lengths:
        plans = {name: _plan(length, full() if name == "bipartite" else causal()) for name in _names()}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
        for number in range(config.rounds + 1):
            for name, plan in plans.items():
                seconds = _once(block, gate, plan, name)
                if number:  # the first warms up
                    results[name].append(seconds)
        for name, runs in results.items():
            rows.append({"policy": name, "length": length} | {part: median(run[part] for run in runs) for part in runs[0]})
    config.json.write_text(json.dumps(rows, indent=1) + "\n")
    report(rows)
    for world in (2, 4, 8):
        print(f"a new plan for {world} ranks: {1e3 * median(_planning(world, n) for n in range(config.rounds)):.0f} ms")


def _planning(world: int, number: int) -> float:
    """Seconds of a plan that was not made before."""
    asked: dict[str, Any] = dict(heads=4, head_dim=64, schedule="token_ring", layout="contiguous", topology="cpu")
    begin = perf_counter()
    make_plan(1024 + 64 * number, world=world, **asked)
    return perf_counter() - begin


def _names() -> tuple[str, ...]:
    return tuple(_decisions(_plan(8, causal()), DeleteGate(1)))


def _plan(length: int, mask: Any) -> Plan:
    return make_plan(length, world=1, heads=4, head_dim=64, mask=mask, schedule="ring", topology="cpu")


def _once(block: Block, gate: DeleteGate, plan: Plan, name: str) -> dict[str, float]:
    """Seconds of every part, once, on a new input."""
    x = torch.randn(1, plan.seq_len, SHAPE.dim, requires_grad=True)
    seconds, clock = {}, perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        seconds[part], clock = perf_counter() - clock, perf_counter()

    _differentiated(block(x, torch.arange(plan.seq_len), plan), x)
    lap("whole")
    with torch.no_grad():
        merge = _decisions(plan, gate)[name](x.detach())
    lap("decide")
    short = shorten(merge, plan, bucket=1 if name == "windows 2" else BUCKET, schedule="ring", topology="cpu")
    lap("shorten")
    y = short.merge(x)
    _differentiated(y, x)
    lap("merge")
    y = y.detach().requires_grad_()
    bias, positions = short.key_bias, short.positions
    clock = perf_counter()
    out = block(y, positions, short.plan, None, bias)
    _differentiated(out, y)
    lap("short")
    out = out.detach().requires_grad_()
    _differentiated(short.unmerge(out), out)
    lap("unmerge")
    return seconds


def _differentiated(out: Tensor, x: Tensor) -> None:
    torch.autograd.grad(out, x, torch.ones_like(out))


def report(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many blocks on the short sequence pay for merging."""
    table = Table("policy", box=box.MARKDOWN)
    for name in ("rows", "block, whole", "block, short", *PARTS, "own / saved by a block"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: _names().index(row["policy"])):
        saved, own = row["whole"] - row["short"], sum(row[part] for part in PARTS)
        times = (f"{1e3 * row[part]:.1f}" for part in ("whole", "short", *PARTS))
        table.add_row(row["policy"], str(row["length"]), *times, f"{own / saved:.2f}" if saved > 0 else "never")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
