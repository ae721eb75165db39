"""Attention on the ranks at hand: forward and forward + backward time of each schedule, and how much communication hides.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/attention.py --seq-len 4096 --dtype bfloat16

All schedules are run in turn, round after round, so that a slow minute of the machine hits all of them; the medians of the
slowest rank are printed, and ratios to the first schedule. "hidden" compares the pass with compute alone and transfers alone
(see `ringattn.measure`). The prediction beside it is the plan's own, for the topology given.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn import Plan, RingAttnError, attention, make_plan
from ringattn.cost import traffic
from ringattn.measure import Overlap, overlap

MASKS = {"full": ringattn.full, "causal": ringattn.causal}


@dataclass(frozen=True)
class Config:
    """What to run."""

    seq_len: int = 4096
    """Tokens in the whole sequence."""
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    mask: str = "causal"
    """full or causal"""
    layout: str = "zigzag"
    schedules: tuple[str, ...] = ("ring", "bidirectional_ring", "token_ring", "auto")
    """The first one is what the others are compared with."""
    topology: str | None = None
    """A preset's name or a file written by `ringattn probe`; what `auto` and the predictions go by."""
    rounds: int = 9
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class Row:
    """Seconds are medians over rounds, of the slowest rank."""

    schedule: str
    forward: float
    both: float
    hidden_forward: float
    hidden_backward: float
    sent_forward: int
    sent_backward: int


def main(config: Config) -> None:
    mesh = ringattn.init()
    plans = {name: _plan(config, name, mesh.size()) for name in config.schedules}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    for round_number in range(config.rounds + 1):
        for name, plan in plans.items():
            seconds = _once(plan, config, mesh.get_local_rank(), mesh.device_type)
            if round_number:  # the first round pays for first touches
                times[name].append(seconds)
    rows = [_row(name, plans[name], times[name], config) for name in plans]
    if mesh.get_local_rank() == 0:
        _print(rows, plans, config, mesh.size())
    dist.destroy_process_group()


def _plan(config: Config, schedule: str, world: int) -> Plan:
    topology = (
        ringattn.load_topology(config.topology) if config.topology and Path(config.topology).exists() else config.topology
    )
    return make_plan(
        config.seq_len,
        world=world,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        mask=MASKS[config.mask](),
        schedule=schedule,
        layout=config.layout,
        topology=topology,
    )


def _once(plan: Plan, config: Config, rank: int, device: str) -> tuple[float, float]:
    """Seconds of a forward pass, and of forward and backward together."""

    def some(heads: int) -> torch.Tensor:
        shape = (config.batch, plan.rows(rank), heads, config.head_dim)
        return torch.randn(shape, dtype=getattr(torch, config.dtype), device=device, requires_grad=True)

    q, k, v = some(config.heads), some(config.kv_heads), some(config.kv_heads)
    with torch.no_grad():
        begin = _now(device)
        attention(q, k, v, plan)
        forward = _now(device) - begin
    begin = _now(device)
    out = attention(q, k, v, plan)
    out.backward(torch.ones_like(out))
    return forward, _now(device) - begin


def _now(device: str) -> float:
    """The time when all ranks have come here."""
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return perf_counter()


def _row(name: str, plan: Plan, times: list[tuple[float, float]], config: Config) -> Row:
    medians = torch.tensor([median(column) for column in zip(*times, strict=True)], dtype=torch.float64)
    passes: list[Overlap] = [overlap(plan, batch=config.batch, backward=b, repeats=config.rounds) for b in (False, True)]
    sent = [sum(traffic(plan, batch=config.batch, backward=b).values()) for b in (False, True)]
    return Row(name, *medians.tolist(), *(p.hidden for p in passes), *sent)


def _print(rows: list[Row], plans: dict[str, Plan], config: Config, world: int) -> None:
    base = rows[0]
    table = Table(
        title=f"{config.seq_len} tokens on {world} ranks, {config.heads} heads over {config.kv_heads} of {config.head_dim}, "
        f"{config.dtype}, {config.mask}, {config.layout}"
    )
    for head in (
        "schedule",
        "forward",
        "forward+backward",
        f"ratio to {base.schedule}",
        "hidden fwd / bwd",
        "MB sent fwd / bwd",
    ):
        table.add_column(head, justify="left" if head == "schedule" else "right")
    for row in rows:
        table.add_row(
            row.schedule if row.schedule != "auto" else f"auto ({_names(plans['auto'])})",
            f"{row.forward * 1e3:.1f} ms",
            f"{row.both * 1e3:.1f} ms",
            f"{base.forward / row.forward:.2f} x, {base.both / row.both:.2f} x",
            f"{row.hidden_forward:.0%} / {row.hidden_backward:.0%}",
            f"{row.sent_forward / 1e6:.1f} / {row.sent_backward / 1e6:.1f}",
        )
    Console(width=130).print(table)
    if config.json:
        facts = dict(
            config=asdict(config) | {"json": None}, world=world, torch=torch.__version__, rows=[asdict(row) for row in rows]
        )
        config.json.write_text(json.dumps(facts, indent=1) + "\n")


def _names(plan: Plan) -> str:
    forward, backward = ("|".join(lane.schedule.name for lane in lanes) for lanes in (plan.forward, plan.backward))
    return forward if forward == backward else f"{forward}, backward {backward}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except RingAttnError as error:
        raise SystemExit(str(error)) from None
