"""Measures the most memory that one rank takes during a pass, beside what its plan says.

One rank of several runs alone: what it receives are buffers that nobody fills, so its memory is that of a rank in a process of
its own. `ringattn.planner.pass_bytes` counts from the plan what the engine should hold. The kernel is emulated: scratch memory
of a real one is its own affair, and is measured too, without a bound. On a CPU the fused kernels are stand-ins that take the
memory they would take on a GPU, since torch's operators in their place need temporaries.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import SCHEDULES, OneRank, Shards, backward, forward, one_rank, plan_for
from dense import random_inputs
from stage import Stage
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ringattn import Plan, full
from ringattn.kernels import fused
from ringattn.planner import pass_bytes

RANK = 1
ALLOWED = 0.10
INSTANT = "emulated:1e+30"


def run(stage: Stage) -> None:
    rows, heads, dim, worlds = (256, 4, 64, (4,)) if stage.small else (4096, 16, 128, (2, 4, 8))
    dtype = torch.bfloat16
    stage.note(rows_per_rank=rows, heads=heads, head_dim=dim, dtype="bfloat16", mask="full", allowed=ALLOWED)
    for world in worlds:
        e = random_inputs(world * rows, heads, dim, dtype, stage.device)
        for schedule in SCHEDULES:
            with stage.guard(f"{schedule}, {world} ranks"):
                entry(stage, e, schedule, world)


def entry(stage: Stage, e: Any, schedule: str, world: int) -> None:
    """Two rows: forward and backward of one schedule."""
    shape = dict(heads=e.q.shape[2], head_dim=e.q.shape[3], dtype=e.q.dtype, mask=full())
    plan, real = (plan_for(e.q.shape[1], world, schedule, **shape, kernel=kernel) for kernel in (INSTANT, "sdpa"))
    results = measured(stage, plan, *one_rank(e, plan, RANK))
    with_kernel = (0, 0) if stage.small else measured(stage, real, *one_rank(e, real, RANK))
    for name, peak, scratch, behind in zip(("forward", "backward"), results, with_kernel, (False, True), strict=True):
        counted = pass_bytes(plan, RANK, backward=behind, surrogates=False)  # the emulated kernel asks for none
        off = peak / counted - 1
        megabytes = {"peak_mb": peak, "plan_mb": counted, "with_sdpa_mb": scratch}
        rounded = {key: round(value / 1e6, 3) for key, value in megabytes.items() if value}
        stage.row("memory", schedule=schedule, ranks=world, direction=name, **rounded, off=round(off, 3))
        words = f"{schedule}, {world} ranks, {name}: peak memory beside what the plan says"
        stage.goal(words, round(off, 3), least=-ALLOWED, most=ALLOWED)


def measured(stage: Stage, plan: Plan, shards: Shards, transport: OneRank) -> tuple[int, int]:
    """The most bytes taken at once beyond those before, in forward and in backward."""
    backward(forward(plan, shards, transport=transport), shards)
    on_gpu, outs = stage.device.type == "cuda", list[Tensor]()
    most = most_on_cuda if on_gpu else most_on_cpu
    with nullcontext() if on_gpu else fused.launches_replaced(lambda name: None):
        ahead = most(lambda: outs.extend(forward(plan, shards, transport=transport)))
        return ahead, most(lambda: backward(outs, shards))


def most_on_cuda(action: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def most_on_cpu(action: Callable[[], Any]) -> int:
    """By what torch's allocator says in a trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    taken = most = 0
    for _, change in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"):
        taken += change
        most = max(most, taken)
    return most
