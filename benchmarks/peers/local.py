"""The local kernel that every peer is given: attention on one device, with lse, and its backward from the whole row's lse.

    Cpu         torch's fused CPU operator, the same that ringattn runs there
    Emulated    takes the time that the flops would take at a given rate, leaves the core free meanwhile, answers zeros

Tensors are (batch, heads, rows, head_dim); lse is (batch, heads, rows). A causal mask ends at the last query and the last key,
as flash-attn's does. Emulated time is counted as `ringattn.kernels.emulated` counts it: 2 matrix products forward, 5 backward.
No dropout, window, bias or softcap: no peer is run with one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten


class Local(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These keys' share of (dq, dk, dv)."""


class Cpu:
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        before = _keys_before(q, k, causal)
        q, k, v = map(_dense_rows, (q, k, v))
        operator = aten._scaled_dot_product_flash_attention_for_cpu
        if not before:
            out, lse = operator(q, k, v, 0.0, causal, scale=scale)
            return out, lse
        # The operator's causal mask starts at the first query and key, so keys that all queries see are a call of their own.
        visible, diagonal = (k[:, :, :before], v[:, :, :before]), (k[:, :, before:], v[:, :, before:])
        return merge(*operator(q, *visible, 0.0, False, scale=scale), *operator(q, *diagonal, 0.0, True, scale=scale))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = _keys_before(q, k, causal)
        dout, q, k, v, out = map(_dense_rows, (dout, q, k, v, out))
        operator = aten._scaled_dot_product_flash_attention_for_cpu_backward
        if not before:
            dq, dk, dv = operator(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
            return dq, dk, dv
        visible, diagonal = (k[:, :, :before], v[:, :, :before]), (k[:, :, before:], v[:, :, before:])
        dq, *of_seen = operator(dout, q, *visible, out, lse, 0.0, False, scale=scale)
        dq_too, *of_diagonal = operator(dout, q, *diagonal, out, lse, 0.0, True, scale=scale)
        dk, dv = (torch.cat(pair, dim=2) for pair in zip(of_seen, of_diagonal, strict=True))
        return dq + dq_too, dk, dv


@dataclass(frozen=True)
class Emulated:
    flops: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        self._take(q, k, causal, products=2)
        # In memory as the operator leaves it, rows before heads, so that a peer copies neither more nor less than otherwise.
        out = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._take(q, k, causal, products=5)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def _take(self, q: Tensor, k: Tensor, causal: bool, products: int) -> None:
        batch, heads, rows, head_dim = q.shape
        area = rows * _keys_before(q, k, causal) + rows * (rows + 1) // 2 if causal else rows * k.shape[2]
        time.sleep(2 * products * area * head_dim * heads * batch / self.flops)


def choose(flops: float) -> Local:
    """`flops` is an emulated accelerator's flop/s; 0 computes for real."""
    return Emulated(flops) if flops else Cpu()


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the same rows; -inf in lse is a row that saw nothing there."""
    total = torch.logaddexp(lse, other_lse)
    weights = ((x - total).exp().nan_to_num_(0.0).unsqueeze(-1) for x in (lse, other_lse))
    return torch.add(*(x * w for x, w in zip((out, other), weights, strict=True))).to(out.dtype), total


def _keys_before(q: Tensor, k: Tensor, causal: bool) -> int:
    """Keys that even the first query sees, its own not counted."""
    before = k.shape[2] - q.shape[2] if causal else 0
    if before < 0:
        raise ValueError(f"causal with {q.shape[2]} queries and {k.shape[2]} keys: some queries would see none")
    return before


def _dense_rows(x: Tensor) -> Tensor:
    """The operator takes neighbours within a head to be neighbours in memory and does not look."""
    return x if x.stride(-1) == 1 else x.contiguous()
