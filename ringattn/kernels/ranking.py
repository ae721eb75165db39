"""Measures which kernel is fastest on a device for given shapes, as a name for `make_plan(kernel=...)`.

    from ringattn.kernels.ranking import rank
    for timing in rank(device, torch.bfloat16, heads=32, kv_heads=8, head_dim=128):
        print(timing)

All ranks must make a plan with the same name: measure on one rank and broadcast the name, or write it down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.errors import InputError
from ringattn.kernels import KERNELS, Kernel, Operands, Options, Rows, get
from ringattn.kernels.lse import accum_dtype
from ringattn.kernels.select import resolved, unsupported_reason
from ringattn.plan.kernel_names import parse
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, Segment

WARM_UP, REPEATS = 3, 9


class Timing(NamedTuple):
    """The time of one kernel for one block, or the reason why it was not measured."""

    kernel: str
    operator: str  # the operator that computes, see `resolved`; empty where none does
    forward: float  # seconds, median; inf where it failed or cannot run
    backward: float
    failed: str = ""

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def __str__(self) -> str:
        if self.failed:
            return f"{self.kernel}: {self.failed}"
        return f"{self.kernel} ({self.operator}): forward {self.forward * 1e3:.3g} ms, backward {self.backward * 1e3:.3g} ms"


def rank(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    rows: int = 4096,
    batch: int = 1,
    band: Band = CAUSAL,
    bias: bool = False,
    softcap: float | None = None,
    kernels: Sequence[str] = (),
    repeats: int = REPEATS,
) -> list[Timing]:
    """Time `kernels` (all but `reference` by default); the fastest first, kernels that cannot run last.

    Runs of different kernels are interleaved, so that a GPU that slows down as it warms slows all of them; the median counts.
    Each is warmed up before, when cuDNN makes its plans and flex compiles. Nothing is sent, no process group is needed.

    Raises:
        InputError: `kernels` names a kernel that does not exist.
    """
    device, value_dim = torch.device(device), head_dim if value_dim is None else value_dim
    for name in kernels:
        parse(name, InputError)
    names = kernels or [name for name in KERNELS if name != "reference"]
    block, dout = _tensors(device, dtype, batch, rows, (heads, kv_heads), (head_dim, value_dim), bias)
    options, segments = Options(head_dim**-0.5, softcap), [Segment(0, rows, 0, rows, band)]
    running: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    failed: dict[str, str] = {}
    for name in names:
        why = unsupported_reason(name, device, dtype, head_dim, value_dim, bias=bias)
        try:
            passes = None if why else _passes(get(name), block, dout, segments, options)
        except Exception as error:  # a package may raise anything, and the others must still be measured
            why, passes = f"{type(error).__name__}: {error}", None
        if passes is None:
            failed[name] = why or "cannot run"
        else:
            running[name] = passes
    seconds = _interleaved(running, device, repeats)
    call = dict(bias=bias, softcap=softcap is not None)
    operators = {name: resolved(name, device, dtype, head_dim, value_dim, heads, **call) for name in running}
    measured = [Timing(name, operators[name], *seconds[name]) for name in running]
    measured.sort(key=lambda timing: timing.seconds)
    return measured + [Timing(name, "", float("inf"), float("inf"), why) for name, why in failed.items()]


def _tensors(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rows: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    bias: bool,
) -> tuple[Operands, Tensor]:
    source = torch.Generator().manual_seed(0)
    # In the memory order of models and messages: (batch, rows, heads, dim).
    shapes = [
        (batch, rows, h, d) for h, d in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    ]
    q, k, v, dout = (torch.randn(s, generator=source).to(device, dtype).transpose(1, 2) for s in shapes)
    key_bias = torch.randn(batch, heads[1], rows, generator=source).to(device, accum_dtype(dtype)) if bias else None
    return Operands(q, k, v, key_bias), dout


def _passes(
    kernel: Kernel, block: Operands, dout: Tensor, segments: list[Segment], options: Options
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Both passes, warmed up."""
    out, lse = kernel.forward(block, segments, options)
    rows = Rows(dout, lse, (dout.to(lse.dtype) * out).sum(-1))

    def forward() -> object:
        return kernel.forward(block, segments, options)

    def backward() -> object:
        return kernel.backward(block, rows, segments, options)

    for _ in range(WARM_UP):
        forward(), backward()
    _finish(dout.device)
    return forward, backward


def _interleaved(
    running: dict[str, tuple[Callable[[], object], Callable[[], object]]], device: torch.device, repeats: int
) -> dict[str, tuple[float, float]]:
    samples: dict[str, list[list[float]]] = {name: [[], []] for name in running}
    for _ in range(repeats):
        for name, passes in running.items():
            for sample, run in zip(samples[name], passes, strict=True):
                _finish(device)
                started = perf_counter()
                run()
                _finish(device)
                sample.append(perf_counter() - started)
    return {name: (median(forward), median(backward)) for name, (forward, backward) in samples.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
