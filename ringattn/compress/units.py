"""Similarity that is the same number everywhere: directions as whole numbers, whose products no order of summation can change.

Which rows merge hangs on comparing similarities, and ties are common (padding, repeated tokens). A matrix product in floating
point gives other last bits for other shapes, so one process and eight ranks would merge different rows. Here a row's direction
is rounded to whole numbers of at most 2^20; products of up to 4,096 of them are whole numbers below 2^53, which fp64 holds
exactly: cosine similarity to 2e-5 or better, and the same bits for every tiling, order, thread count and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.errors import InputError

ONE = 1 << 20  # length of a direction
SAME = ONE * ONE  # similarity of a direction with itself, up to rounding
NONE = -(1 << 62)  # below every similarity
MOST_CHANNELS = 4096  # squares of so many numbers of 20 bits sum up to less than 2^53


def units(metric: Tensor) -> Tensor:
    """Directions of the rows of `metric`, (..., dim): whole numbers in int32. A row of zeros, or one with NaN or inf, is 0."""
    if metric.shape[-1] > MOST_CHANNELS:
        raise InputError(
            f"metric has {metric.shape[-1]} channels and similarity is exact for {MOST_CHANNELS}; use the mean over heads, or "
            "a projection"
        )
    x = metric.detach().double()
    largest = x.abs().amax(-1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    largest = largest.where(usable, 1)
    power = largest / torch.frexp(largest).mantissa  # of two: dividing by it brings the largest to [1/2, 1) without rounding
    x = (x.where(usable, 0) / power * ONE).round()  # squares of these sum up exactly, in any order
    length = x.square().sum(-1, keepdim=True).sqrt()
    return (x / length.clamp(min=1) * ONE).round().int()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(..., rows of a, rows of b): whole numbers in fp64, `SAME` times the cosine. a, b: from `units`."""
    return a.double() @ b.double().transpose(-1, -2)
