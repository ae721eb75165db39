"""One message, one buffer: tensors of several shapes and dtypes packed to bytes and seen again as tensors.

Both ends know every shape beforehand, so nothing but the payload travels: the bytes on a link are exactly the closed form.
Wider dtypes come first, which keeps every tensor aligned without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _widest_first(specs: Sequence[Spec]) -> list[int]:
    return sorted(range(len(specs)), key=lambda n: -specs[n].dtype.itemsize)


def pack(tensors: Sequence[Tensor], specs: Sequence[Spec]) -> Tensor:
    """A new uint8 tensor holding `tensors`, cast to `specs`."""
    buffer = torch.empty(sum(s.nbytes for s in specs), dtype=torch.uint8, device=tensors[0].device)
    for slot, n in zip(unpack(buffer, specs), range(len(specs)), strict=True):
        slot.copy_(tensors[n])
    return buffer


def unpack(buffer: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """Views into `buffer`, in the order of `specs`."""
    views: dict[int, Tensor] = {}
    start = 0
    for n in _widest_first(specs):
        stop = start + specs[n].nbytes
        views[n] = buffer[start:stop].view(specs[n].dtype).view(specs[n].shape)
        start = stop
    return [views[n] for n in range(len(specs))]
