"""Captures forward and backward of all simulated ranks in a CUDA graph, replays it on other numbers, and compares the bits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import (
    BOUNDS,
    HANDS_OVER,
    SCHEDULES,
    Example,
    Shards,
    backward,
    cut,
    deterministic,
    error,
    forward,
    kernels_here,
    plan_for,
    simulated,
)
from dense import random_inputs
from stage import NotApplicable, Stage
from torch import Tensor

from ringattn import Plan, causal


def run(stage: Stage) -> None:
    if stage.device.type != "cuda":
        raise NotApplicable("CUDA graphs are of CUDA")
    rows, heads, dim, dtype = 1024, 8, 128, torch.bfloat16
    here, _ = kernels_here(stage.device, dtype, dim)
    stage.note(rows_per_rank=rows, heads=heads, head_dim=dim, hands_over=HANDS_OVER)
    for kernel in (name for name in ("sdpa", "flash", "cudnn", "flash3") if name in here):
        for world, schedules in ((1, ("ring",)), (4, SCHEDULES)):
            for schedule in schedules:
                if stage.left() < 0:
                    stage.omit(f"{kernel}, {world} ranks, {schedule}: no time was left")
                    continue
                with stage.guard(f"{kernel}, {world} ranks, {schedule}"):
                    e = random_inputs(world * rows, heads, dim, dtype, stage.device)
                    plan = plan_for(world * rows, world, schedule, heads=heads, head_dim=dim, dtype=dtype, mask=causal(),
                                    kernel=kernel)  # fmt: skip
                    entry(stage, e, plan, kernel, schedule)


def entry(stage: Stage, e: Example, plan: Plan, kernel: str, schedule: str) -> None:
    """One row: whether a replay gives the bits of an eager call, and microseconds of both."""
    shards = cut(e, plan)

    def both() -> list[Tensor]:
        outs = forward(plan, shards, transport=simulated(plan.world))
        return [*(out.detach() for out in outs), *backward(outs, shards)]

    with deterministic():
        replay, results = captured(both)
        other_numbers(shards)
        replay()
        outcomes, expected, again = [x.clone() for x in results], both(), both()
    where = f"{kernel}, {plan.world} ranks, {schedule}"
    equal = same_bits(outcomes, expected)
    if same_bits(expected, again):
        stage.check(equal, f"{where}: a replayed graph gives other bits than an eager call")
    else:  # a kernel that promises no equal bits is held to its rounding
        off = max(error(a, b.double()) for a, b in zip(outcomes, expected, strict=True))
        stage.check(off <= BOUNDS[e.q.dtype], f"{where}: a replayed graph is off by {100 * off:.2g} % of an eager call")
    eager, graph = clocked(both), clocked(replay)
    stage.row("graphs", kernel=kernel, ranks=plan.world, schedule=schedule, equal=equal, eager_us=eager, graph_us=graph)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def captured(action: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """How to replay `action`, and the tensors that hold its results then. It runs a few times before, on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = action()
    return graph.replay, results


def other_numbers(shards: Shards) -> None:
    """In the same memory, which is what a graph reads."""
    with torch.no_grad():
        for leaf in shards.leaves:
            leaf.copy_(torch.randn_like(leaf))


def clocked(action: Callable[[], object], calls: int = 10) -> float:
    """Microseconds of one call, host included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        action()
    torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - begin) / calls, 1)
