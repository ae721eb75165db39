"""Rotary position embedding by global position: a row is turned by where it is in the sequence, not by where it is stored.

Su et al. 2021, https://arxiv.org/abs/2104.09864; channels are paired n with n + head_dim / 2, as in Llama's published weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 (..., rows, head_dim / 2). positions: int64 (rows,) or (batch, rows), global; theta: the base."""
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    # A product, not a matmul: autocast leaves it in fp32. In bf16 neighbouring positions beyond 256 would be the same.
    angles = positions.float().unsqueeze(-1) * theta ** (-channels / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels of x, (batch, rows, heads, head_dim), in x's own dtype. cos, sin: from `rotary`."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # (..., rows, 1, head_dim / 2): the same for all heads
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
