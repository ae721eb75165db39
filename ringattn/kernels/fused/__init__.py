"""Merges partial results of attention and prepares row statistics, each in one pass over memory on GPUs.

    merge(parts, out, lse)               several partial results of the same queries, by log-sum-exp
    add(parts, total)                    several partial sums, as of gradients
    surrogate_out(dout, delta)           an out with the delta of the true one, for backward kernels that take out
    row_statistics(dout, out, lse)       delta and lse of whole rows, as backward kernels take them

Each is a Triton kernel on CUDA (`triton_ops`) and a few torch operators elsewhere (`eager_ops`). Merging n parts at once, with
weights exp(lse_i - lse), reads every part once and writes the result once, where merging two at a time would read and write the
sum n times. Results are formed in the order of `parts`, so they are the same bits every time. The two forms give equal sums,
and merges that differ by a few roundings of fp32, from their exp and log.

Parts cover rows [start, stop) of the block; rows that no part covers are those of queries without keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.fused import eager_ops

__all__ = ["PartialRows", "SumRows", "add", "launches_replaced", "merge", "row_statistics", "surrogate_out", "triton_runs"]

MOST_PROGRAMS = 65535  # along the second and third dimension of a CUDA grid: heads, and batch
_replacing = False  # whether launches are replaced, see `launches_replaced`


class PartialRows(NamedTuple):
    """Attention of rows [start, stop) of a block to some keys."""

    start: int
    stop: int
    out: Tensor  # (batch, heads, stop - start, head_dim)
    lse: Tensor  # (batch, heads, stop - start), natural log; -inf for a row without keys


class SumRows(NamedTuple):
    """One part of a sum, over rows [start, stop) of a block."""

    start: int
    stop: int
    values: Tensor  # (batch, heads, stop - start, head_dim), or (batch, heads, stop - start)


def merge(parts: Sequence[PartialRows], out: Tensor, lse: Tensor) -> None:
    """Write the attention over all keys of `parts` to out and lse.

    out: (batch, heads, rows, head_dim), of any floating-point dtype; sums are formed in fp32, or fp64 where lse is.
    lse: (batch, heads, rows).
    """
    _ops(out, parts[0].out).merge(parts, out, lse)


def add(parts: Sequence[SumRows], total: Tensor) -> None:
    """Write the sum of `parts` to total: (batch, heads, rows[, head_dim]), of any floating-point dtype; 0 where there is none.

    Sums are formed in fp32, or fp64 where a part is.
    """
    _ops(total, parts[0].values).add(parts, total)


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    """A tensor in dout's shape and dtype whose row-wise product with dout sums to delta: the multiple of dout that does.

    A backward kernel that takes out uses only this sum of it, so it may get this tensor in place of the true out, which then
    need not travel. Its norm is never larger than that of the true out (Cauchy-Schwarz), so it does not overflow.

    dout: (batch, heads, rows, head_dim). delta: (batch, heads, rows), fp32 or fp64.
    """
    out: Tensor = _ops(dout, dout).surrogate_out(dout, delta)
    return out


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """delta = sum(dout * out) of each row, and lse with +inf where a row has no keys, which makes its probabilities exactly 0.

    dout, out: (batch, heads, rows, head_dim). lse: (batch, heads, rows), fp32 or fp64; both results are like it.
    """
    statistics: tuple[Tensor, Tensor] = _ops(dout, out).row_statistics(dout, out, lse)
    return statistics


def _ops(*tensors: Tensor) -> Any:
    """The module for these tensors: Triton's where it can run. It computes in fp32, so torch's operators compute fp64."""
    fits = tensors[0].is_cuda and max(tensors[0].shape[:2]) <= MOST_PROGRAMS
    if _replacing or (fits and all(t.element_size() < 8 and t.ndim == 4 for t in tensors) and triton_runs()):
        from ringattn.kernels.fused import triton_ops

        return triton_ops
    return eager_ops


@contextmanager
def launches_replaced(on_launch: Callable[[str], None]) -> Iterator[None]:
    """Call `on_launch` with a Triton kernel's name instead of launching it, for tensors of any device and without a GPU.

    Results are not computed. The number of launches and the allocations are those on a GPU, so both can be measured anywhere.
    """
    global _replacing
    from ringattn.kernels.fused import triton_ops

    before, _replacing = _replacing, True
    try:
        with triton_ops.replaced(on_launch):
            yield
    finally:
        _replacing = before


@cache
def triton_runs() -> bool:
    """Whether Triton's kernels can be compiled and launched here: it needs a C compiler, which some images of torch lack."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    from ringattn.kernels.fused import triton_ops

    try:
        ones = torch.ones(1, 1, 1, 16, device="cuda")
        triton_ops.surrogate_out(ones, ones[..., 0])
    except Exception as error:  # the compiler, the linker and the driver may raise anything
        warnings.warn(f"Triton's kernels do not run here, merging takes torch's operators instead: {error}", stacklevel=2)
        return False
    return True
