"""Reports on a run from rank 0: a line or a bar for each step, metrics.jsonl for machines, and a table at the end."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import Counter
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh

from ringattn import Plan
from ringattn.execution import overlap
from ringattn.planner import traffic

MIB = 1 << 20


class Log(AbstractContextManager["Log"]):
    """One dict of metrics per step: appended to `path` as a JSON line, shown on stderr as a bar or, without a terminal, a line.

    Lines that `path` already holds for steps after `done` come from a run that went on beyond its checkpoint: they are dropped,
    since those steps are made again. Where `reports` is false, on all ranks but the first, only times are kept.
    """

    def __init__(self, path: Path, *, reports: bool, done: int, steps: int) -> None:
        self.reports, self.steps, self.seconds = reports, steps, list[float]()
        if not reports:
            return
        self.file: TextIO | None = None
        try:
            valid = [line for line in read_metrics(path) if line["step"] <= done]
            trimmed = path.with_suffix(".kept")  # replaces the log in one step: a process that dies here loses no line
            trimmed.write_text("".join(json.dumps(line) + "\n" for line in valid))
            trimmed.replace(path)
            self.file = path.open("a", buffering=1)
        except OSError as error:
            self._stop_writing(error)
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        if self.bar is not None:
            self.task = self.bar.add_task("", total=steps, completed=done)
            self.bar.start()

    def step(self, metrics: dict[str, Any]) -> None:
        self.seconds.append(metrics["seconds"])
        if not self.reports:
            return
        try:
            if self.file:
                self.file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            self._stop_writing(error)
        text = "loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s".format(**metrics)
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=text)
        else:
            self.message(f"step {metrics['step']}/{self.steps}  {text}")

    def _stop_writing(self, error: OSError) -> None:
        """Training goes on; the warning comes once."""
        self.file = None
        self.message(f"warning: metrics are no longer written: {error}")

    def message(self, text: str) -> None:
        if self.reports:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.reports:
            if self.file:
                self.file.close()
            if self.bar is not None:
                self.bar.stop()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps logged in `path`; a last line cut short by a crash does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(plans: list[Plan], mesh: DeviceMesh, *, batch: int, gradient_bytes: int, seconds: list[float]) -> Table:
    """The table at the end of a run; collective, since it measures how much communication hides behind compute.

    plans: of every block's attention.
    """
    plan, shortest = plans[0], min(plan.seq_len for plan in plans)
    peak = torch.tensor(_peak_bytes(mesh), dtype=torch.int64, device=mesh.device_type)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=mesh.get_group())
    forward, backward = (overlap(plan, batch=batch, group=mesh, backward=b, repeats=5) for b in (False, True))
    step = median(seconds)
    crowded = mesh.device_type == "cpu" and plan.world > (os.cpu_count() or 1)
    caption = "more ranks than cores: what moves bytes takes a core from what computes, so little can hide" if crowded else None
    table = Table(
        title=f"{plan.world} ranks, {plan.seq_len:,} tokens, {plan.forward[0].schedule.name}",
        title_justify="left",
        caption=caption,
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("counted how")
    table.add_row("throughput", f"{batch * plan.seq_len / step:,.0f} tokens/s", f"median step of {step:.2f} s")
    table.add_row("attention sends", _mib(_most_sent(plans, batch)), "per step, busiest rank, forward + backward, all layers")
    if shortest < plan.seq_len:
        table.add_row("merged", f"{shortest:,} of {plan.seq_len:,} tokens", "slots of groups in the last step")
    reduced = 2 * gradient_bytes * (plan.world - 1) // plan.world
    table.add_row("gradient reduction sends", _mib(reduced), "per step and rank, as a ring all-reduce")
    table.add_row(
        "peak memory", _mib(int(peak)), "largest of all ranks, " + ("allocated on the GPU" if _on_gpu(mesh) else "resident")
    )
    for name, times in (("forward", forward), ("backward", backward)):
        apart = f"compute {times.compute * 1e3:.0f} ms, transfer {times.transfer * 1e3:.0f} ms"
        how = f"one layer: {apart}, together {times.together * 1e3:.0f} ms"
        table.add_row(f"communication hidden, {name}", f"{times.hidden:.0%}", how)
    return table


def _most_sent(plans: list[Plan], batch: int) -> int:
    """Bytes that the busiest rank sends for attention in one step, counted from the plans."""
    sent: Counter[int] = Counter()
    for plan, backward in product(plans, (False, True)):
        for (src, _), size in traffic(plan, batch=batch, backward=backward).items():
            sent[src] += size
    return max(sent.values(), default=0)


def print_table(table: Table) -> None:
    """To stdout, at the width of the terminal, or wide where there is none."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"


def _on_gpu(mesh: DeviceMesh) -> bool:
    return bool(mesh.device_type == "cuda")


def _peak_bytes(mesh: DeviceMesh) -> int:
    if _on_gpu(mesh):
        return torch.cuda.max_memory_allocated()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
