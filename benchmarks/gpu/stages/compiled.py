"""Compiles the attention call in one graph and compares its bits with those of an eager call.

One rank, which needs no process group; what it costs to reach peers from a compiled graph is for `nccl` and real machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import deterministic
from dense import random_inputs
from stage import Stage
from torch import Tensor

import ringattn


def run(stage: Stage) -> None:
    rows, heads, dim, dtype = (96, 2, 16, torch.float32) if stage.small else (4096, 16, 128, torch.bfloat16)
    plan = ringattn.make_plan(rows, world=1, heads=heads, head_dim=dim, dtype=dtype)
    e = random_inputs(rows, heads, dim, dtype, stage.device)
    leaves = [x.detach().requires_grad_() for x in e[:3]]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Operations around the call give the compiler something to fuse up to it.
        return ringattn.attention(q * 2.0, k, v + 1.0, plan) * 0.5

    # A CPU would compile C++ for most of a minute, and shows the same with the compiler's last part left out.
    ways: dict[str, dict[str, Any]] = {"aot_eager": {"backend": "aot_eager"}}
    if not stage.small:
        ways = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
    with deterministic():  # or eager itself would differ from run to run
        expected = both(layer, leaves, e.dout)
        for name, how in ways.items():
            with stage.guard(name):
                entry(stage, name, layer, how, leaves, e.dout, expected)


def entry(
    stage: Stage,
    name: str,
    layer: Callable[..., Tensor],
    how: dict[str, Any],
    leaves: list[Tensor],
    dout: Tensor,
    expected: list[Tensor],
) -> None:
    """One row: whether the bits are equal in several calls, seconds to compile, microseconds of a call and of an eager one."""
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, **how)
    begin = time.perf_counter()
    results = both(compiled, leaves, dout)
    seconds = time.perf_counter() - begin
    calls = [results, *(both(compiled, leaves, dout) for _ in range(3))]  # reduce-overhead captures in the second, then replays
    equal = [all(torch.equal(a, b) for a, b in zip(call, expected, strict=True)) for call in calls]
    stage.check(
        all(equal), f"{name}: other bits than an eager call, in calls {[n for n, same in enumerate(equal) if not same]}"
    )
    times = {"compiled_us": clocked(compiled, leaves, dout), "eager_us": clocked(layer, leaves, dout)}
    stage.row("compiled", way=name, equal=all(equal), seconds_to_compile=round(seconds, 2), **times)


def both(layer: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    """out and gradients, in memory of their own: a replayed graph would write over them."""
    torch.compiler.cudagraph_mark_step_begin()
    out = layer(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    return [x.detach().clone() for x in (out, *grads)]


def clocked(layer: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, calls: int = 5) -> float:
    cuda = leaves[0].device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        both(layer, leaves, dout)
    if cuda:
        torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - begin) / calls, 1)
