"""Counts what one rank launches for each tile besides attention, and the host's time for each tile.

On CUDA launches are counted by the profiler: kernels, copies and fills on the device. On a CPU they are the operators that
would launch something: those that neither make a view nor only take memory.
Host time is that of a pass whose kernel returns at once; what that kernel itself takes is not in it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from common import Example, OneRank, Shards, backward, forward, kernels_here, one_rank, plan_for, synchronize, tiles
from dense import random_inputs
from stage import Stage
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # it is documented there
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn import Plan, causal, full
from ringattn.kernels import get

WORLD, RANK = 4, 1
SCHEDULES, MASKS = ("ring", "token_ring"), {"full": full(), "causal": causal()}
# Names of device kernels, and of operators, that compute attention itself.
ATTENTION = re.compile(r"flash|fmha|cudnn|sdpa|scaled_dot_product|attention|softmax_lse|mha", re.IGNORECASE)
NOTHING = re.compile(r"^aten::(new_)?empty|^aten::(detach|alias|lift_fresh|set_|resize_)|_strided$|^profiler::")
INSTANT = "emulated:1e+30"
LAUNCHES, HOST_US = {"forward": 3.0, "backward": 6.0}, 60.0  # goals, where Triton merges


def run(stage: Stage) -> None:
    rows, heads, dim, dtype = (64, 4, 32, torch.float32) if stage.small else (2048, 16, 128, torch.bfloat16)
    stage.note(ranks=WORLD, rows_per_rank=rows, heads=heads, head_dim=dim)
    here, _ = kernels_here(stage.device, dtype, dim)
    for schedule in SCHEDULES:
        for mask in MASKS:
            for kernel in (name for name in ("sdpa", "cudnn", "flash", "flash3") if name in here):
                with stage.guard(f"launches of {kernel}, {schedule}, {mask}"):
                    e = random_inputs(WORLD * rows, heads, dim, dtype, stage.device)
                    launches(stage, e, kernel, schedule, mask)
            with stage.guard(f"host time of {schedule}, {mask}"):
                e = random_inputs(WORLD * 64, 4, 64, torch.float32, stage.device)
                host_time(stage, e, schedule, mask)


def planned(e: Example, kernel: str, schedule: str, mask: str) -> Plan:
    shape = dict(heads=e.q.shape[2], head_dim=e.q.shape[3], dtype=e.q.dtype)
    return plan_for(e.q.shape[1], WORLD, schedule, **shape, mask=MASKS[mask], kernel=kernel)


def launches(stage: Stage, e: Example, kernel: str, schedule: str, mask: str) -> None:
    """One row: launches for each tile that are not attention, forward and backward, and which they are."""
    plan = planned(e, kernel, schedule, mask)
    shards, transport = one_rank(e, plan, RANK)
    backward(forward(plan, shards, transport=transport), shards)  # what is made once is made now
    count = launched_on_cuda if stage.device.type == "cuda" else launched_on_cpu
    outs: list[torch.Tensor] = []
    ahead = count(lambda: outs.extend(forward(plan, shards, transport=transport)))
    back = count(lambda: backward(outs, shards))
    results: dict[str, Any] = {}
    for name, counted, behind in (("forward", ahead, False), ("backward", back, True)):
        others = Counter({what: n for what, n in counted.items() if not ATTENTION.search(what)})
        number = tiles(plan, RANK, backward=behind)
        results[name] = round(others.total() / number, 2)
        results[f"{name}_most"] = ", ".join(f"{n} {what[:60]}" for what, n in others.most_common(6))
    stage.row("launches", kernel=kernel, schedule=schedule, mask=mask, **results)
    for name, most in LAUNCHES.items() if kernel == "sdpa" and not stage.small else ():
        stage.goal(f"{schedule}, {mask}, {name}: launches per tile that are not attention", results[name], most=most)


def launched_on_cuda(action: Callable[[], Any]) -> Counter[str]:
    """What ran on the device, by name."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        action()
        torch.cuda.synchronize()
    results: Counter[str] = Counter()
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA and not event.key.startswith(("ringattn/", "ProfilerStep")):
            results[event.key] += event.count
    return results


class Operators(TorchDispatchMode):
    """Counts operators that would launch something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.launch_counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not view and not NOTHING.search(schema.name):
            self.launch_counts[schema.name] += 1
        return func(*args, **(kwargs or {}))


def launched_on_cpu(action: Callable[[], Any]) -> Counter[str]:
    with Operators() as counting:
        action()
    results: Counter[str] = counting.launch_counts
    return results


def host_time(stage: Stage, e: Example, schedule: str, mask: str) -> None:
    """One row: microseconds of the host for each tile, medians of forward and of backward passes."""
    plan = planned(e, INSTANT, schedule, mask)
    shards, transport = one_rank(e, plan, RANK)
    with inside_kernel(plan.kernel) as spent:
        results = [passes(stage, plan, shards, transport, spent) for _ in range(5 if stage.small else 60)][2:]
    names = ("forward", "backward")
    microseconds = {name: round(1e6 * median(times), 1) for name, times in zip(names, zip(*results, strict=True), strict=True)}
    stage.row("host_us_per_tile", schedule=schedule, mask=mask, **microseconds)
    for name, found_us in microseconds.items() if not stage.small else ():
        stage.goal(f"{schedule}, {mask}, {name}: host us per tile", found_us, most=HOST_US)


def passes(stage: Stage, plan: Plan, shards: Shards, transport: OneRank, spent: list[float]) -> tuple[float, float]:
    """Seconds for each tile of one forward and one backward pass, without those inside the kernel."""
    synchronize(stage.device)
    marks, inside = [time.perf_counter()], []
    outs: list[torch.Tensor] = []
    for action in (lambda: outs.extend(forward(plan, shards, transport=transport)), lambda: backward(outs, shards)):
        spent.clear()
        action()
        marks.append(time.perf_counter())
        inside.append(sum(spent))
    ahead, back = (after - before - less for before, after, less in zip(marks, marks[1:], inside, strict=False))
    return ahead / tiles(plan, RANK, backward=False), back / tiles(plan, RANK, backward=True)


@contextmanager
def inside_kernel(name: str) -> Iterator[list[float]]:
    """Seconds of each call of this kernel, as they are spent."""
    kernel: Any = get(name)
    spent: list[float] = []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **more)
            spent.append(time.perf_counter() - begin)
            return result

        return call

    kernel.forward, kernel.backward = clocked(kernel.forward), clocked(kernel.backward)
    try:
        yield spent
    finally:
        del kernel.forward, kernel.backward  # those of its class again
