"""Launches the Triton kernels of `fused`: one launch for each merge, sum, surrogate out or row statistic.

The kernels are in `triton_kernels`; this module passes tensors as pointers and strides. Heads and rows may have any strides, as
slices of messages and of fused projections do; head_dim is copied where it is not contiguous.

Nothing here has run on a GPU; Triton's interpreter runs it on CPU tensors in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ringattn.kernels.fused import PartialRows, SumRows

MOST_PARTS = 4  # that one launch merges; more are merged in several
ELEMENTS = 2048  # of one part that a program holds at once: 8 KiB of fp32, in registers

Launch = Callable[[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


def merge(parts: Sequence[PartialRows], out: Tensor, lse: Tensor) -> None:
    while len(parts) > MOST_PARTS:
        wide = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
        merge(parts[:MOST_PARTS], *wide)
        parts = [type(parts[0])(0, lse.shape[2], *wide), *parts[MOST_PARTS:]]
    args: list[Any] = []
    for part in _padded_parts(parts):
        values = _dense_heads(part.out)
        args += [values, part.lse, *values.stride()[:3], *part.lse.stride(), part.start, part.stop]
    args += [out, lse, *out.stride()[:3], *lse.stride(), lse.shape[2]]
    _launch("merge", _grid(out), tuple(args), _shape(out) | {"PARTS": len(parts)})


def add(parts: Sequence[SumRows], total: Tensor) -> None:
    while len(parts) > MOST_PARTS:
        wide = torch.empty_like(total, dtype=torch.float32)
        add(parts[:MOST_PARTS], wide)
        parts = [type(parts[0])(0, total.shape[2], wide), *parts[MOST_PARTS:]]
    args: list[Any] = []
    for part in _padded_parts(parts):
        values = _dense_heads(part.values)
        args += [values, *values.stride()[:3], part.start, part.stop]
    args += [total, *total.stride()[:3], total.shape[2]]
    _launch("add", _grid(total), tuple(args), _shape(total) | {"PARTS": len(parts)})


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    dout = _dense_heads(dout)
    out = _rows_before_heads(dout, dout.dtype)
    strides = (*dout.stride()[:3], *delta.stride(), *out.stride()[:3])
    _launch("surrogate_out", _grid(out), (dout, delta, out, *strides, out.shape[2]), _shape(out))
    return out


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    dout, out, lse = _dense_heads(dout), _dense_heads(out), lse.contiguous()
    delta, safe_lse = torch.empty_like(lse), torch.empty_like(lse)
    strides = (*dout.stride()[:3], *out.stride()[:3], *lse.stride())
    _launch("row_statistics", _grid(out), (dout, out, lse, delta, safe_lse, *strides, out.shape[2]), _shape(out))
    return delta, safe_lse


def _padded_parts(parts: Sequence[Any]) -> list[Any]:
    """Pad `parts` to the number of pointers that the kernel takes; the additional ones are not read."""
    return [*parts, *[parts[0]] * (MOST_PARTS - len(parts))]


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_before_heads(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor (batch, heads, rows, head_dim) stored as (batch, rows, heads, head_dim)."""
    batch, heads, rows, dim = like.shape
    return torch.empty((batch, rows, heads, dim), dtype=dtype, device=like.device).transpose(1, 2)


def _rows_per_program(dim: int) -> int:
    return max(1, ELEMENTS // _power_of_two(dim))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _grid(x: Tensor) -> tuple[int, ...]:
    batch, heads, rows, dim = x.shape
    return -(-rows // _rows_per_program(dim)), heads, batch


def _shape(x: Tensor) -> dict[str, int]:
    dim = x.shape[-1]
    return {"DIM": dim, "BLOCK_DIM": _power_of_two(dim), "BLOCK_ROWS": _rows_per_program(dim)}


def _launch_on_device(name: str, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    if all(grid):
        from ringattn.kernels.fused import triton_kernels

        getattr(triton_kernels, name)[grid](*args, **constants)


_launch: Launch = _launch_on_device


@contextmanager
def replaced(on_launch: Callable[[str], None]) -> Iterator[None]:
    """Call `on_launch` with a kernel's name instead of launching it, to count launches without a GPU."""
    global _launch
    before, _launch = _launch, lambda name, *_: on_launch(name)
    try:
        yield
    finally:
        _launch = before
