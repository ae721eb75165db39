"""Attention on the ranks at hand: forward and forward + backward time of each schedule, and how much communication hides.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/attention.py --seq-len 4096 --dtype bfloat16

All schedules are run in turn, round after round, so that a slow minute of the machine hits all of them; the medians of the
slowest rank are printed, and ratios to the first row. "hidden" compares the pass with compute alone and transfers alone
(see `ringattn.execution.overlap`). With `--transports p2p shared_memory` each schedule runs over both, in turn as well, and the
last column says how many times less it takes: forward, both passes, CPU time; and forward and backward transfers alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn import Plan, RingAttnError, attention, make_plan
from ringattn.comm import choose
from ringattn.execution import Overlap, overlap
from ringattn.planner import traffic

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
    kernel: str = "auto"
    """With emulated:1e15 nothing is computed, and a call takes as long as its transfers and the host's part in them."""
    transports: tuple[str, ...] = ()
    """Of p2p and shared_memory those to compare; by default the one that `init` takes."""
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class Row:
    """Seconds are medians over rounds, of the slowest rank; `cpu` is of both passes, of all ranks and their threads."""

    schedule: str
    transport: str
    forward: float
    both: float
    cpu: float
    hidden_forward: float
    hidden_backward: float
    transfer_forward: float
    transfer_backward: float
    sent_forward: int
    sent_backward: int


def main(config: Config) -> None:
    mesh = ringattn.init()
    plans = {name: _plan(config, name, mesh.size()) for name in config.schedules}
    groups = _groups(mesh, config.transports)
    runs = [(name, transport) for name in plans for transport in groups]
    times: dict[tuple[str, str], list[tuple[float, float, float]]] = {run: [] for run in runs}
    parts: dict[tuple[str, str], list[tuple[Overlap, Overlap]]] = {run: [] for run in runs}
    for round_number in range(config.rounds + 1):
        for name, transport in runs:
            plan, group = plans[name], groups[transport]
            seconds = _once(plan, config, group, mesh.device_type)
            forward, backward = (overlap(plan, batch=config.batch, group=group, backward=b, repeats=1) for b in (False, True))
            if round_number:  # the first round pays for first touches
                times[name, transport].append(seconds)
                parts[name, transport].append((forward, backward))
    rows = [_row(*run, plans[run[0]], times[run], parts[run], config) for run in runs]
    if mesh.get_local_rank() == 0:
        _print(rows, plans, config, mesh.size())
    dist.destroy_process_group()


def _groups(mesh: DeviceMesh, transports: tuple[str, ...]) -> dict[str, dist.ProcessGroup]:
    """A group of all ranks for each transport."""
    if not transports:
        return {"": mesh.get_group()}
    groups = {name: dist.new_group() for name in transports}
    for name, group in groups.items():
        choose(group, name)
    return groups


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
        kernel=config.kernel,
    )


def _once(plan: Plan, config: Config, group: dist.ProcessGroup, device: str) -> tuple[float, float, float]:
    """Seconds of a forward pass, of forward and backward together, and of the CPU for the latter."""
    rank = dist.get_rank(group)

    def subset(heads: int) -> torch.Tensor:
        shape = (config.batch, plan.rows(rank), heads, config.head_dim)
        return torch.randn(shape, dtype=getattr(torch, config.dtype), device=device, requires_grad=True)

    q, k, v = subset(config.heads), subset(config.kv_heads), subset(config.kv_heads)
    with torch.no_grad():
        begin = _now(device)
        attention(q, k, v, plan, group=group)
        forward = _now(device) - begin
    begin, cpu = _now(device), process_time()
    out = attention(q, k, v, plan, group=group)
    out.backward(torch.ones_like(out))
    both = _now(device) - begin
    used = torch.tensor(process_time() - cpu, dtype=torch.float64, device=device)
    dist.all_reduce(used)
    return forward, both, used.item()


def _now(device: str) -> float:
    """The time when all ranks have come here."""
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return perf_counter()


def _row(
    name: str,
    transport: str,
    plan: Plan,
    times: list[tuple[float, float, float]],
    parts: list[tuple[Overlap, Overlap]],
    config: Config,
) -> Row:
    medians = torch.tensor([median(column) for column in zip(*times, strict=True)], dtype=torch.float64)
    passes = [
        Overlap(*(median(getattr(part, what) for part in column) for what in ("together", "compute", "transfer")))
        for column in zip(*parts, strict=True)
    ]
    sent = [sum(traffic(plan, batch=config.batch, backward=b).values()) for b in (False, True)]
    return Row(name, transport, *medians.tolist(), *(p.hidden for p in passes), *(p.transfer for p in passes), *sent)


def _print(rows: list[Row], plans: dict[str, Plan], config: Config, world: int) -> None:
    base, named = rows[0], f"auto ({_names(plans['auto'])})" if "auto" in plans else ""
    table = Table(
        title=f"{config.seq_len} tokens on {world} ranks, {config.heads} heads over {config.kv_heads} of {config.head_dim}, "
        f"{config.dtype}, {config.mask}, {config.layout}"
    )
    for head in (
        "schedule",
        "forward",
        "forward+backward",
        "CPU, all ranks",
        f"ratio to {base.schedule}",
        "hidden fwd / bwd",
        "transfers fwd / bwd",
        "MB sent fwd / bwd",
        *[f"ratio to {base.transport}, transfers alone"] * bool(base.transport),
    ):
        table.add_column(head, justify="left" if head == "schedule" else "right")
    for row in rows:
        other = next(entry for entry in rows if entry.schedule == row.schedule)
        gains = (other.forward / row.forward, other.both / row.both, other.cpu / row.cpu)
        alone = (other.transfer_forward / row.transfer_forward, other.transfer_backward / row.transfer_backward)
        table.add_row(
            f"{row.schedule if row.schedule != 'auto' else named} {row.transport}",
            f"{row.forward * 1e3:.1f} ms",
            f"{row.both * 1e3:.1f} ms",
            f"{row.cpu * 1e3:.1f} ms",
            f"{base.forward / row.forward:.2f} x, {base.both / row.both:.2f} x",
            f"{row.hidden_forward:.0%} / {row.hidden_backward:.0%}",
            f"{row.transfer_forward * 1e3:.1f} / {row.transfer_backward * 1e3:.1f} ms",
            f"{row.sent_forward / 1e6:.1f} / {row.sent_backward / 1e6:.1f}",
            *["{:.2f}, {:.2f}, CPU {:.2f}; {:.2f}, {:.2f}".format(*gains, *alone)] * bool(row.transport),
        )
    Console(width=170).print(table)
    if config.json:
        facts = dict(
            config=asdict(config) | {"json": None}, world=world, torch=torch.__version__, rows=[asdict(row) for row in rows]
        )
        config.json.write_text(json.dumps(facts, indent=1) + "\n")


def _names(plan: Plan) -> str:
    forward, backward = (
        "|".join(head_group.schedule.name for head_group in head_groups) for head_groups in (plan.forward, plan.backward)
    )
    return forward if forward == backward else f"{forward}, backward {backward}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except RingAttnError as error:
        raise SystemExit(str(error)) from None
