"""Peak memory of one attention call on each rank, measured, for a fixed sequence: it should fall as 1 / ranks.

    for n in 2 4 8; do OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node $n benchmarks/buffers.py; done

What torch's CPU allocator hands out during the call, beyond what was there before it, of the rank that needs most: message
buffers, foreign blocks, partial results, and what the call returns. The attention kernel is emulated, since its scratch memory
is its own affair. Beside it stands what the plan says its buffers need. CPU only.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import ringattn
from ringattn import Plan, attention, make_plan
from ringattn.planner import PRESETS, price


@dataclass(frozen=True)
class Config:
    """What to run."""

    seq_len: int = 8192
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    schedules: tuple[str, ...] = ("ring", "token_ring", "mesh", "ring+u2", "auto", "all_gather")
    """`ring+u2` is a ring with ulysses=2."""


def main(config: Config) -> None:
    mesh = ringattn.init()
    rank, world = mesh.get_local_rank(), mesh.size()
    model = f"{config.heads} heads over {config.kv_heads} of {config.head_dim}, bfloat16, causal"
    table = Table(title=f"{config.seq_len} tokens on {world} ranks, {model}")
    for head in ("schedule", "forward MB", "plan's buffers", "backward MB", "plan's buffers"):
        table.add_column(head, justify="right")
    for name in config.schedules:
        schedule, _, degree = name.partition("+u")
        plan = make_plan(
            config.seq_len,
            world=world,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype="bfloat16",
            schedule=schedule,
            ulysses=int(degree) if degree else None,
            kernel="emulated:1e15",
            topology="cpu",
        )
        peaks = torch.tensor(_peaks(plan, rank), dtype=torch.float64)
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        cells = []
        for peak, backward in zip(peaks.tolist(), (False, True), strict=True):
            cells += [f"{peak / 1e6:.2f}", f"{price(plan, PRESETS['cpu'], backward=backward).buffer_bytes / 1e6:.2f}"]
        table.add_row(name, *cells)
    if rank == 0:
        Console(width=110).print(table)
    dist.destroy_process_group()


def _peaks(plan: Plan, rank: int) -> tuple[int, int]:
    """Bytes of the forward and of the backward pass of this rank."""
    shapes = [(1, plan.rows(rank), heads, plan.head_dim) for heads in (plan.heads, plan.kv_heads, plan.kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    attention(q, k, v, plan).sum().backward()  # connections and caches
    q.grad = k.grad = v.grad = None
    with _allocations() as forward:
        out = attention(q, k, v, plan)
    dout = torch.ones_like(out)
    with _allocations() as backward:
        torch.autograd.grad(out, (q, k, v), dout)
    return forward.peak, backward.peak


class _allocations:
    """The most that was allocated at once within a `with`, beyond what was there."""

    def __enter__(self) -> _allocations:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        self.peak = held = 0
        for _, change in changes:
            held += change
            self.peak = max(self.peak, held)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
