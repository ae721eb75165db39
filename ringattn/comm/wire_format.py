"""Packs tensors of several shapes and dtypes into one message, and reads them back as views of it.

Both ends know every shape beforehand, so only the payload travels: the bytes on a link are exactly the closed form. Wider
dtypes come first, which keeps every tensor aligned without padding. Tensors of four dimensions, (batch, heads, rows, head_dim),
lie in memory as (batch, rows, heads, head_dim), which is what attention kernels read and write; so the output of a kernel is
copied as one run of bytes, and a message of a single tensor is that tensor's own memory, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Shape and dtype of a tensor on the wire."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor in the message, in elements."""
        if len(self.shape) != 4:
            return tuple(prod(self.shape[n + 1 :]) for n in range(len(self.shape)))
        _, heads, rows, dim = self.shape
        return heads * rows * dim, dim, heads * dim, 1


class Wire:
    """The layout of one message: the position of each of `specs` in it.

    A message is a contiguous tensor of one dimension and of dtype `unit`, the widest of its tensors' dtypes where its size is a
    multiple of that, else uint8. Only its bytes matter; the unit saves the conversions.
    """

    def __init__(self, specs: Iterable[Spec]) -> None:
        self.specs = tuple(specs)
        self.nbytes = sum(spec.nbytes for spec in self.specs)
        order = sorted(range(len(self.specs)), key=lambda n: -self.specs[n].dtype.itemsize)
        widest = self.specs[order[0]].dtype if order else torch.uint8
        self.unit = widest if self.nbytes % widest.itemsize == 0 else torch.uint8
        self.length = self.nbytes // self.unit.itemsize
        self._placed: list[_Placed] = []
        start = 0
        for n in order:
            spec = self.specs[n]
            first = start // spec.dtype.itemsize  # a whole number, since wider ones come first
            self._placed.append(_Placed(n, spec.dtype, spec.shape, spec.strides, first, start, spec.nbytes))
            start += spec.nbytes

    def empty(self, device: torch.device) -> Tensor:
        """An uninitialized message."""
        return torch.empty(self.length, dtype=self.unit, device=device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in `buffer`, a message, in the order of `specs`."""
        tensors: list[Tensor] = [buffer] * len(self.specs)
        dtype, typed = self.unit, buffer
        for placed in self._placed:
            first = placed.first
            if self.unit == torch.uint8:
                typed, first = buffer.narrow(0, placed.start, placed.nbytes).view(placed.dtype), 0
            elif placed.dtype != dtype:
                dtype, typed = placed.dtype, buffer.view(placed.dtype)
            tensors[placed.n] = typed.as_strided(placed.shape, placed.strides, typed.storage_offset() + first)
        return tensors

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """A message that holds `tensors`, cast to `specs`. For a single tensor it may be that tensor's memory."""
        runs = [_as_run(tensors[placed.n], placed, self.unit) for placed in self._placed]
        ready = [run for run in runs if run is not None]
        if len(ready) == len(runs):
            return ready[0] if len(runs) == 1 else torch.cat(ready)
        buffer = self.empty(tensors[0].device)
        for slot, tensor in zip(self.views(buffer), tensors, strict=True):
            slot.copy_(tensor)
        return buffer


class _Placed(NamedTuple):
    """One tensor's place in a message; `first` counts its own elements, `start` bytes."""

    n: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    start: int
    nbytes: int


def _as_run(tensor: Tensor, placed: _Placed, unit: torch.dtype) -> Tensor | None:
    """The memory of `tensor` in units, if it has the layout of the message, else None."""
    if tensor.dtype != placed.dtype or placed.nbytes % unit.itemsize:
        return None
    if tensor.stride() != placed.strides and any(
        actual != expected
        for actual, expected, size in zip(tensor.stride(), placed.strides, placed.shape, strict=True)
        if size > 1
    ):
        return None
    first = tensor.storage_offset()
    if first * placed.dtype.itemsize % unit.itemsize:
        return None
    run = tensor.as_strided((tensor.numel(),), (1,), first)
    return run if placed.dtype == unit else run.view(unit)


def pack(tensors: Sequence[Tensor], specs: Sequence[Spec]) -> Tensor:
    """A new uint8 tensor holding `tensors`, cast to `specs`."""
    packed = Wire(specs).pack(tensors).view(torch.uint8)
    return packed.clone() if len(tensors) == 1 else packed


def unpack(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """Views into `buffer`, the result of `pack`, in the order of `specs`."""
    wire = Wire(specs)
    return wire.views(buffer.view(wire.unit))
