"""Tries inputs that have broken attention kernels before; each trap says in words what went wrong, and the others go on.

Several ranks are simulated, since what a kernel marks wrongly (a row that sees nothing, say) often shows only when partial
results are merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from common import BOUNDS, Example, answer, dense, deterministic, error, example, kernels_here, plan_for, visible
from stage import Stage
from torch import Tensor

from ringattn import Mask, Plan, causal, full, sliding_window

WORLD = 4
# torch takes cuDNN's attention for not deterministic, and leaves it out where determinism is asked for.
NOT_PROMISED = ("cudnn",)
NAMES = ("out", "dq", "dk", "dv", "dbias")
Trap = Callable[[Stage, str, torch.dtype], str]


def run(stage: Stage) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before its first use, see `deterministic`
    dtype = torch.bfloat16
    here, why = kernels_here(stage.device, dtype, 64)
    here = here[:1] if stage.small else here
    for words in why:
        stage.omit(words)
    for name, trap in TRAPS.items():
        for kernel in here:
            if stage.left() < 0:
                stage.omit(f"{name}, {kernel}: no time was left")
                continue
            before = len(stage.failures)
            results = ""
            with stage.guard(f"{name}, {kernel}"):
                results = trap(stage, kernel, dtype)
                if results:
                    stage.check(False, f"{name}, {kernel}: {results}")
            stage.row("traps", trap=name, kernel=kernel, right=len(stage.failures) == before, words=results)


def compared(stage: Stage, e: Example, mask: Mask, kernel: str, *, world: int = WORLD, schedule: str = "token_ring") -> str:
    """What is wrong with out or a gradient, in words; empty if all is right."""
    exact = dense(e, visible(mask, e.q.shape[1], stage.device))
    results = answer(e, planned(e, mask, kernel, world, schedule))
    bound = BOUNDS[e.q.dtype]
    errors = {name: error(a, b) for name, a, b in zip(NAMES, results, exact, strict=False)}
    return ", ".join(
        f"{name} is off by {100 * off:.2g} % (allowed {100 * bound:g} %)" for name, off in errors.items() if not off <= bound
    )


def planned(
    e: Example, mask: Mask, kernel: str, world: int = WORLD, schedule: str = "token_ring", layout: str = "auto"
) -> Plan:
    length, heads, dim = e.q.shape[1:]
    shape = dict(heads=heads, kv_heads=e.k.shape[2], head_dim=dim, dtype=e.q.dtype, mask=mask)
    return plan_for(length, world, schedule, **shape, kernel=kernel, layout=layout)


def hidden_at_the_end(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """Right padding: the last 300 keys of one sequence have a bias of -inf, more than two blocks of a kernel's keys."""
    length = 500
    e = example(length, 4, 2, 64, device=stage.device, dtype=dtype, batch=2, bias=True)
    assert e.bias is not None
    e.bias[0, -300:] = -torch.inf
    return compared(stage, e, full(), kernel, world=2) or compared(stage, e, causal(), kernel, world=2)


def wide_heads_with_bias(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """Heads of 255 and 256, where the channels of a bias would exceed what the flash kernels take."""
    text = []
    for dim in (255, 256):
        here, why = kernels_here(stage.device, dtype, dim, bias=True)
        if kernel not in here:
            stage.omit(next(words for words in why if words.startswith(f"{kernel}:")))
            continue
        e = example(67, 2, 1, dim, device=stage.device, dtype=dtype, bias=True)
        text.append(compared(stage, e, causal(), kernel))
    return ", ".join(filter(None, text))


def one_row(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """One row for each rank, and ranks without any."""
    results = [
        compared(stage, example(length, 4, 2, 64, device=stage.device, dtype=dtype), mask, kernel)
        for length in (WORLD, WORLD - 1)
        for mask in (full(), causal())
    ]
    return ", ".join(filter(None, results))


def odd_rows(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """Lengths that neither ranks nor blocks divide, with heads that are no multiple of 8."""
    results = [
        compared(stage, example(length, 4, 2, dim, device=stage.device, dtype=dtype), causal(), kernel)
        for length, dim in ((131, 64), (257, 40), (129, 20))
    ]
    return ", ".join(filter(None, results))


def windows(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    e = example(219, 4, 2, 64, device=stage.device, dtype=dtype)
    results = [compared(stage, e, mask, kernel) for mask in (sliding_window(31, 9), sliding_window(64))]
    return ", ".join(filter(None, results))


def shared_heads(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """9 heads over 3, by a schedule that splits heads both ways and by Ulysses."""
    e = example(150, 9, 3, 64, device=stage.device, dtype=dtype)
    results = [
        compared(stage, e, causal(), kernel, world=3, schedule=name) for name in ("bidirectional_ring", "token_ring", "ulysses")
    ]
    return ", ".join(filter(None, results))


def equal_bits(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """The same call twice under `torch.use_deterministic_algorithms`."""
    e = example(512, 8, 2, 64, device=stage.device, dtype=dtype)
    plan = planned(e, causal(), kernel)
    with deterministic():
        first, second = answer(e, plan), answer(e, plan)
    off = [name for name, a, b in zip(NAMES, first, second, strict=False) if not torch.equal(a, b)]
    words = f"{', '.join(off)} differ from one run to the next" if off else ""
    if words and kernel in NOT_PROMISED:
        stage.omit(f"equal bits by {kernel}, which does not promise them: {words}")
        return ""
    return words


def nan_is_kept(stage: Stage, kernel: str, dtype: torch.dtype) -> str:
    """NaN in a value must show in every row that sees the key, and on no rank before it. Rows of the same tile may show it,
    since kernels multiply it by a probability of 0."""
    e = example(40 * WORLD, 2, 2, 64, device=stage.device, dtype=dtype)
    at, first = 100, 80  # the first row of its rank
    e.v[0, at] = torch.nan
    out: Tensor = answer(e, planned(e, causal(), kernel, layout="contiguous"))[0]
    missing = int((~out[0, at:].isnan().all(-1)).any(-1).sum())
    spread = int(out[0, :first].isnan().any(-1).any(-1).sum())
    text = [f"{missing} rows that see NaN show numbers"] if missing else []
    return ", ".join([*text, *([f"{spread} rows of ranks before it are NaN"] if spread else [])])


TRAPS: dict[str, Trap] = {
    "300 hidden keys at the end": hidden_at_the_end,
    "heads of 255 and 256 with a bias": wide_heads_with_bias,
    "one row for each rank": one_row,
    "odd rows": odd_rows,
    "windows": windows,
    "9 heads over 3": shared_heads,
    "equal bits in deterministic mode": equal_bits,
    "NaN is kept": nan_is_kept,
}
