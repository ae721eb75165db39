"""What fused operators lack, made of what they have: a per-key bias, backward from delta, any head size, any place in memory.

- There is no per-key bias with a gradient. Two extra channels carry it (k gets the bias as a high and a low half, q a constant
  that undoes the scale); the scale stays that of the true head_dim, and the channel's gradient is that of the bias.
- A row whose keys are all masked returns an lse of 0 or +inf instead of -inf, and would win every merge. Such rows are found
  and marked.
- Head sizes are made equal, or multiples of 8, with zeros, which change neither logits nor outputs. CUDA operators read 16
  bytes at a time: what a message has brought, packed tightly, is copied to where they can.

It calls no operator: the kernels `sdpa` and `flash` do, between these functions.
"""

from __future__ import annotations

from math import ceil, log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.kernels.base import Operands
from ringattn.mask import Band
from ringattn.partial import Partial, accum_dtype


def with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k with two more channels, in which the bias is added to the logits."""
    high, low = _halves(bias, k, scale)
    q = torch.cat([q, q.new_full((*q.shape[:-1], 2), _unit(scale))], dim=-1)
    return q, torch.cat([k, high, low], dim=-1)


def bias_grad(dk: Tensor, dim: int, bias: Tensor, scale: float) -> Tensor:
    """The gradient of the bias, which is in channel `dim` of dk."""
    wide = dk.select(-1, dim).to(accum_dtype(dk.dtype))
    summed: Tensor = wide.unflatten(1, (bias.shape[1], -1)).sum(2) / (scale * _unit(scale))
    return summed


def seen(out: Tensor, lse: Tensor, block: Operands, band: Band) -> Partial:
    """The operator's answer, with rows that see no key marked as such."""
    if block.bias is None:
        return Partial(out, lse)
    blind = _blind(block.bias, band, block.q)
    return Partial(out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf))


def widen(x: Tensor, width: int) -> Tensor:
    """With zeros up to `width`, and in memory as the operators assume without looking."""
    return pad(_readable(x), (0, width - x.shape[-1])) if x.shape[-1] < width else _readable(x)


def up_to(multiple: int, size: int) -> int:
    return size + -size % multiple


def _readable(x: Tensor) -> Tensor:
    """Neighbours side by side, and on CUDA every row at a multiple of 16 bytes."""
    if x.stride(-1) != 1:
        return x.contiguous()
    if x.device.type != "cuda":
        return x
    steps = [x.storage_offset(), *(stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)]
    if all(step * x.element_size() % 16 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unit(scale: float) -> float:
    """What q holds in the channels of the bias: a power of two, exact in any dtype, with scale * unit between 1 and 2."""
    return 2.0 ** ceil(-log2(scale))


def _halves(bias: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bias of each key as two numbers in k's dtype, (batch, kv_heads, keys, 1) each, whose sum is nearly exact.

    Finite biases stay finite, whatever their size: a mask of `finfo.min` must not turn into -inf, neither here nor when the
    operator multiplies it by q's unit in fp32.
    """
    largest = min(torch.finfo(k.dtype).max, torch.finfo(torch.float32).max / 4 / max(1.0, _unit(scale)))
    value = bias / (scale * _unit(scale))
    value = value.clamp(-largest, largest).masked_fill_(bias == -torch.inf, -torch.inf)
    value = value.repeat_interleave(k.shape[1] // bias.shape[1], dim=1).unsqueeze(-1)
    high = value.to(k.dtype)
    return high, (value - high).masked_fill_(high.isinf(), 0.0).to(k.dtype)


def _blind(bias: Tensor, band: Band, q: Tensor) -> Tensor:
    """(batch, heads, rows) bool: rows whose every key within the band has a bias of -inf."""
    rows, keys = q.shape[2], bias.shape[2]
    live = pad((bias != -torch.inf).cumsum(-1), (1, 0))  # live[..., n]: keys before n that can be seen
    row = torch.arange(rows, device=bias.device)
    stop, start = (row + band.right + 1).clamp(0, keys), (row + band.left).clamp(0, keys)
    seen = live.index_select(-1, stop) - live.index_select(-1, start)
    return (seen == 0).repeat_interleave(q.shape[1] // bias.shape[1], dim=1)
