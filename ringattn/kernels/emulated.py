"""Emulates an accelerator: takes the time that the flops would take at a given rate, and leaves the core free meanwhile.

    make_plan(..., kernel="emulated:50e9")      every rank computes attention at 50 Gflop/s, however few cores there are

Results are zeros, so it is for measuring how a schedule moves and hides its bytes, never for numbers. Only the attention kernel
is emulated: merging, packing and every byte on the links are real. Measurements with it must be called emulated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.lse import Partial, accum_dtype
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import Segment

PRODUCTS_FORWARD, PRODUCTS_BACKWARD = 2, 5  # matrix products of 2 * area * head_dim flops each


class Emulated(Kernel):
    """`flops`: floating-point operations per second."""

    name = "emulated"

    def __init__(self, flops: float) -> None:
        self.flops = flops

    def forward(self, block: Operands, segments: Sequence[Segment], options: Options) -> Partial:
        self._sleep(block, segments, PRODUCTS_FORWARD)
        out = block.q.new_zeros(*block.q.shape[:-1], block.v.shape[-1])
        return Partial(out, out.new_zeros(out.shape[:-1], dtype=accum_dtype(out.dtype)))

    def backward(self, block: Operands, rows: Rows, segments: Sequence[Segment], options: Options) -> Grads:
        self._sleep(block, segments, PRODUCTS_BACKWARD)
        dbias = None if block.bias is None else torch.zeros_like(block.bias)
        return Grads(torch.zeros_like(block.q), torch.zeros_like(block.k), torch.zeros_like(block.v), dbias)

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        return self.forward(block, _full_segment(block, band), options)

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        return self.backward(block, rows, _full_segment(block, band), options)

    def _sleep(self, block: Operands, segments: Sequence[Segment], products: int) -> None:
        batch, heads, _, head_dim = block.q.shape
        area = sum(segment.area for segment in segments)
        time.sleep(2 * products * area * head_dim * heads * batch / self.flops)


def _full_segment(block: Operands, band: Band) -> list[Segment]:
    return [Segment(0, block.q.shape[2], 0, block.k.shape[2], band)]
