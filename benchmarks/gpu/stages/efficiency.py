"""Times all simulated ranks together against dense attention over the whole sequence, which is the same work.

The fraction is dense seconds / ours, forward and backward, taken in turn on the same device: 1.0 says that cutting the sequence
costs nothing but what the links would. There are no links in it; what stands in for them is in the figure `transport`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import TRANSPORT, Example, Shards, backward, cut, forward, interleaved, kernels_here, plan_for, simulated, timed
from dense import Dense, backends, flops, random_inputs
from stage import Stage
from torch import Tensor

from ringattn import Layout, causal, full

ROUNDS = 5
WORLDS, SCHEDULES, LENGTHS = (1, 2, 4, 8), ("token_ring", "ring"), (8192, 16384, 32768, 65536)
MASKS = {"full": full(), "causal": causal()}
# By number of ranks and mask, of the default kernel against the best dense one; several ranks with 8,192 rows each.
GOALS = {(1, "full"): 0.97, (1, "causal"): 0.97, (8, "full"): 0.93, (8, "causal"): 0.88}

Run = Callable[[], list[float]]


class Way(NamedTuple):
    """How ringattn computes it."""

    kernel: str
    schedule: str
    world: int


class Group(NamedTuple):
    """What is timed in turn: one shape, several ways."""

    length: int
    mask: str
    ways: tuple[Way, ...]


def run(stage: Stage) -> None:
    heads, dim, dtype = (2, 32, torch.float32) if stage.small else (32, 128, torch.bfloat16)
    here, why = kernels_here(stage.device, dtype, dim)
    kernels: list[str] = [name for name in ("sdpa", "cudnn", "flash", "flash3") if name in here]
    for words in why:
        stage.omit(words)
    stage.note(transport=TRANSPORT, heads=heads, head_dim=dim, dtype=str(dtype).removeprefix("torch."))
    slowest = 0.0  # seconds for one flop of one way, the most there were so far: what the next groups will take at most
    for group in groups(stage.small, kernels):
        name, work = f"{group.length} rows, {group.mask}", flops(group.length, heads, dim, causal=group.mask == "causal")
        calls = (len(group.ways) + len(backends(stage.device))) * (ROUNDS + 1)
        if stage.left() < calls * work * slowest:
            stage.omit(f"{name}, {len(group.ways)} ways: no time was left")
            continue
        begin = time.perf_counter()
        with stage.guard(name):
            compare(stage, group, random_inputs(group.length, heads, dim, dtype, stage.device))
            slowest = max(slowest, (time.perf_counter() - begin) / (calls * work))


def groups(small: bool, kernels: list[str]) -> Iterator[Group]:
    """Those the goals are about first, then everything else from the shortest sequence up."""
    if small:
        yield Group(256, "causal", (Way("sdpa", "token_ring", 1), Way("sdpa", "token_ring", 2), Way("sdpa", "ring", 2)))
        yield Group(256, "full", (Way("sdpa", "token_ring", 2),))
        return
    goals = tuple(Way("sdpa", "token_ring", world) for world in (1, 8))
    for mask in MASKS:
        yield Group(LENGTHS[-1], mask, goals)
    ways = [
        Way(kernel, schedule, world)
        for world in WORLDS
        for schedule in (SCHEDULES if world > 1 else SCHEDULES[:1])
        for kernel in kernels
    ]
    for length in LENGTHS:
        for mask in MASKS:
            yield Group(length, mask, tuple(way for way in ways if length < LENGTHS[-1] or way not in goals))


def compare(stage: Stage, group: Group, e: Example) -> None:
    """One row for each way: its seconds, and dense seconds over them."""
    everything: dict[str, Run] = {}
    for name in backends(stage.device):
        entry = Dense(name, e, causal=group.mask == "causal")
        try:
            entry.forward()
            entry.out = None
        except RuntimeError as error:
            stage.omit(f"dense {name}: {str(error).strip().splitlines()[0][:200]}")
            continue
        if name != "efficient":  # never the best, and slow
            everything[f"dense {name}"] = lambda entry=entry: timed(stage.device, entry.forward, entry.backward)  # type: ignore[misc]
    cuts: dict[Layout, Shards] = {}  # shared by ways that cut alike: at 64k rows each takes 2 GB
    everything |= {" ".join(map(str, way)): ours(stage.device, group, way, e, cuts) for way in group.ways}
    results = interleaved(everything, ROUNDS)
    dense = {name.removeprefix("dense "): sum(seconds) for name, seconds in results.items() if name.startswith("dense ")}
    best = min(dense, key=lambda name: dense[name])
    for way in group.ways:
        ahead, back = results[" ".join(map(str, way))]
        fraction = dense[best] / (ahead + back)
        same = dense.get(way.kernel, dense["torch"] if way.kernel == "sdpa" else None)  # sdpa chooses as torch does
        times = dict(forward_ms=round(1e3 * ahead, 3), backward_ms=round(1e3 * back, 3), dense_ms=round(1e3 * dense[best], 3))
        where = dict(kernel=way.kernel, schedule=way.schedule, ranks=way.world, rows=group.length, mask=group.mask)
        of_same = None if same is None else round(same / (ahead + back), 3)
        stage.row("efficiency", **where, **times, best_dense=best, of_best=round(fraction, 3), of_same_kernel=of_same)
        goal = GOALS.get((way.world, group.mask))
        if goal and way.kernel == "sdpa" and not stage.small and (way.world == 1 or group.length == 8 * 8192):
            words = (
                f"{way.world} ranks, {way.schedule}, {group.length} rows, {group.mask}: fraction of the best dense attention"
            )
            stage.goal(words, round(fraction, 3), least=goal)


def ours(device: torch.device, group: Group, way: Way, e: Example, cuts: dict[Layout, Shards]) -> Run:
    """A call that gives the seconds of forward and of backward, all ranks together."""
    given = dict(heads=e.q.shape[2], head_dim=e.q.shape[3], dtype=e.q.dtype, mask=MASKS[group.mask], kernel=way.kernel)
    given |= {"layout": "zigzag"} if group.mask == "causal" else {}
    plan = plan_for(group.length, way.world, way.schedule, **given)
    if plan.layout not in cuts:
        cuts[plan.layout] = cut(e, plan)
    shards = cuts[plan.layout]

    def once() -> list[float]:
        outs: list[Tensor] = []
        return timed(
            device,
            lambda: outs.extend(forward(plan, shards, transport=simulated(way.world))),
            lambda: backward(outs, shards),
        )

    return once
