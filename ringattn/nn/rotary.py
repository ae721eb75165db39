"""Applies rotary position embedding by global position: it depends on a row's position in the sequence, not in the shard.

Su et al. 2021, https://arxiv.org/abs/2104.09864; channels are paired n with n + head_dim / 2, as in Llama's published weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn._validation import as_finite_float, short_repr
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor

MOST_CHANNELS = 1 << 20


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 (..., rows, head_dim / 2). positions: int64 (rows,) or (batch, rows), global; theta: the base."""
    if not as_strided_tensor("positions", positions).ndim or positions.is_complex():
        raise InputError(f"positions: {positions.dtype} of shape {tuple(positions.shape)}; give int64 (rows,) or (batch, rows)")
    if not isinstance(head_dim, int) or not 0 < head_dim <= MOST_CHANNELS or head_dim % 2:
        raise InputError(f"head_dim={short_repr(head_dim)}; must be even, since pairs of channels are rotated")
    if (as_finite_float(theta) or 0) <= 0:
        raise InputError(f"theta={short_repr(theta)}; must be positive and finite")
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    # A product, not a matmul: autocast leaves it in fp32. In bf16 neighbouring positions beyond 256 would be equal.
    angles = positions.float().unsqueeze(-1) * theta ** (-channels / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of channels of x, (batch, rows, heads, head_dim), in x's own dtype. cos, sin: from `rotary`."""
    cos_shape, sin_shape = as_strided_tensor("cos", cos).shape, as_strided_tensor("sin", sin).shape
    fits = as_strided_tensor("x", x).ndim >= 3 and len(cos_shape) >= 2 and x.shape[-1] == 2 * cos_shape[-1]
    fits = fits and x.shape[-3] == cos_shape[-2]
    if not fits or sin_shape != cos_shape or x.is_complex() or cos_shape[:-2] not in ((), x.shape[:-3]):
        raise InputError(
            f"x has shape {tuple(x.shape)}, cos {tuple(cos_shape)} and sin {tuple(sin_shape)}; give x (batch, rows, heads, "
            "head_dim) with cos and sin from rotary(positions, head_dim, theta) of these rows"
        )
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # (..., rows, 1, head_dim / 2): the same for all heads
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
