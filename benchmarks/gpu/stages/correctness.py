"""Compares every kernel that runs here x simulated ranks x schedules, both passes, with dense attention in fp64.

An error is a norm relative to that of the exact result. Lengths divide by nothing and KV heads are shared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from common import BOUNDS, SCHEDULES, TRANSPORT, Example, answer, dense, error, example, kernels_here, plan_for, visible
from stage import Stage

from ringattn import Mask, causal, documents, full, sliding_window

HEADS, KV_HEADS, DIM, LENGTH = 8, 4, 64, 203
NAMES = ("out", "dq", "dk", "dv", "dbias")


class Case(NamedTuple):
    name: str
    mask: Mask
    bias: bool = False
    softcap: float | None = None


CASES = (
    Case("causal", causal()),
    Case("full, bias", full(), bias=True),
    Case("window both ways", sliding_window(31, 9)),
    Case("documents in a window, bias", documents((0, 3, 64, 65, 150, LENGTH)) & sliding_window(40), bias=True),
    Case("causal, softcap", causal(), softcap=2.0),
)


def run(stage: Stage) -> None:
    """The cases that matter most come first, so that one which is cut short has told most."""
    stage.note(transport=TRANSPORT, length=LENGTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    stage.note(bounds={str(dtype).removeprefix("torch."): bound for dtype, bound in BOUNDS.items()})
    worlds, cases = ((4,), CASES[:2]) if stage.small else ((2, 4, 8), CASES)
    dtypes = (torch.bfloat16, torch.float32)
    for case in cases:
        keep = visible(case.mask, LENGTH, stage.device)
        for dtype in dtypes:
            e = example(LENGTH, HEADS, KV_HEADS, DIM, device=stage.device, dtype=dtype, bias=case.bias)
            exact = dense(e, keep, softcap=case.softcap)
            here, why = kernels_here(stage.device, dtype, DIM, bias=case.bias)
            if case is cases[0]:
                for words in why:
                    stage.omit(f"{str(dtype).removeprefix('torch.')}, {words}")
            for kernel in here:
                for world in worlds:
                    if stage.left() > 0:
                        compare(stage, case, e, exact, kernel, world)
                    else:
                        stage.omit(f"{case.name}, {dtype}, {kernel}, {world} ranks: no time was left")


def compare(stage: Stage, case: Case, e: Example, exact: list[torch.Tensor], kernel: str, world: int) -> None:
    """One kernel and number of ranks by all schedules: one row with the largest error of each."""
    errors: dict[str, float] = {}
    bound, dtype = BOUNDS[e.q.dtype], str(e.q.dtype).removeprefix("torch.")
    for schedule in SCHEDULES:
        where = f"{kernel}, {dtype}, {world} ranks, {schedule}, {case.name}"
        with stage.guard(where):
            shape = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, mask=case.mask, kernel=kernel)
            results = answer(e, plan_for(LENGTH, world, schedule, **shape), softcap=case.softcap)
            of_each = {name: error(a, b) for name, a, b in zip(NAMES, results, exact, strict=False)}
            errors[schedule] = max(of_each.values())
            off = [f"{name} is off by {100 * wrong:.2g} %" for name, wrong in of_each.items() if not wrong <= bound]
            stage.check(not off, f"{where}: {', '.join(off)}")
    if errors:
        stage.row("errors", kernel=kernel, dtype=dtype, ranks=world, case=case.name, bound=bound, **errors)
