"""Measures what the device can do at best: copying, matrix products, and dense attention by each of torch's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import interleaved, often, timed
from dense import Dense, backends, flops, random_inputs
from stage import Stage


def run(stage: Stage) -> None:
    bandwidth(stage)
    product(stage)
    heads, dim = (4, 32) if stage.small else (32, 128)
    stage.note(heads=heads, head_dim=dim, dtype="float32" if stage.small else "bfloat16", rounds=3)
    for length in (256, 512) if stage.small else (8192, 16384, 32768, 65536):
        for causal in (False, True):
            if stage.left() > 0:
                attention(stage, length, heads, dim, causal)
            else:
                stage.omit(f"{length} rows, {'causal' if causal else 'full'}: no time was left")


def bandwidth(stage: Stage) -> None:
    """Bytes read and written per second by a copy on the device."""
    count = (16 if stage.small else 1024) << 20
    source = torch.empty(count, dtype=torch.uint8, device=stage.device).zero_()
    target = torch.empty_like(source)
    seconds = often(stage.device, lambda: target.copy_(source), calls=3 if stage.small else 20)
    stage.note(copy_gb_per_s=round(2 * count / seconds / 1e9, 1))


def product(stage: Stage) -> None:
    size = 256 if stage.small else 8192
    for dtype in (torch.float32,) if stage.small else (torch.bfloat16, torch.float16):
        a, b = torch.randn(2, size, size, device=stage.device, dtype=dtype).unbind()
        seconds = often(stage.device, lambda a=a, b=b: a @ b, calls=3 if stage.small else 10)  # type: ignore[misc]
        stage.row("products", dtype=str(dtype).removeprefix("torch."), size=size, tflops=round(2 * size**3 / seconds / 1e12, 3))


def attention(stage: Stage, length: int, heads: int, dim: int, causal: bool) -> None:
    """All kernels in turn on one shape; forward and backward are timed apart."""
    where = f"{length} rows, {'causal' if causal else 'full'}"
    dtype = torch.float32 if stage.small else torch.bfloat16
    contenders: dict[str, Callable[[], list[float]]] = {}
    e = random_inputs(length, heads, dim, dtype, stage.device)
    for name in backends(stage.device):
        entry = Dense(name, e, causal=causal)
        try:
            first = timed(stage.device, entry.forward, entry.backward)
        except RuntimeError as error:  # torch's way to say that this kernel does not take these tensors here
            stage.omit(f"{name}, {where}: {str(error).strip().splitlines()[0][:200]}")
            continue
        # A first call may compile; what follows is not slower. Four more are needed.
        if 4 * sum(first) > max(2.0, stage.left()):
            stage.omit(f"{name}, {where}: no time was left")
            continue
        contenders[name] = lambda entry=entry: timed(stage.device, entry.forward, entry.backward)  # type: ignore[misc]
    for name, (ahead, back) in interleaved(contenders, rounds=3).items():
        work = flops(length, heads, dim, causal=causal)
        speed = dict(forward=round(work / ahead / 1e12, 3), backward=round(2.5 * work / back / 1e12, 3))
        both = round(3.5 * work / (ahead + back) / 1e12, 3)
        stage.row("dense", kernel=name, rows=length, mask="causal" if causal else "full", **speed, both=both)
