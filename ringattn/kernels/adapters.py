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

from math import ceil, floor, log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.kernels.base import Operands
from ringattn.kernels.lse import Partial, accum_dtype
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import FULL


def with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k with two more channels, in which the bias is added to the logits."""
    high, low = _halves(bias, k, scale)
    q = torch.cat([q, q.new_full((*q.shape[:-1], 2), _unit(scale, k.dtype))], dim=-1)
    return q, torch.cat([k, high, low], dim=-1)


def bias_grad(dk: Tensor, dim: int, bias: Tensor, scale: float) -> Tensor:
    """The gradient of the bias, which is in channel `dim` of dk."""
    wide = dk.select(-1, dim).to(accum_dtype(dk.dtype))
    summed: Tensor = wide.unflatten(1, (bias.shape[1], -1)).sum(2) / (scale * _unit(scale, dk.dtype))
    return summed


def seen(out: Tensor, lse: Tensor, block: Operands, band: Band) -> Partial:
    """The operator's answer, with rows that see no key marked as such."""
    if block.bias is None:
        return Partial(out, lse)
    blind = _blind(block.bias, band, block.q)
    return Partial(out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf))


def pad_head_dim(x: Tensor, width: int) -> Tensor:
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


def _unit(scale: float, dtype: torch.dtype) -> float:
    """What q holds in the channels of the bias: a power of two, exact in any dtype, with scale * unit between 1 and 2.

    Smaller where `dtype` ends before that (fp16 at 2^15, for scales below 2^-15).
    """
    return 2.0 ** min(ceil(-log2(scale)), floor(log2(torch.finfo(dtype).max)))


def _halves(bias: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bias of each key as two numbers in k's dtype, (batch, kv_heads, keys, 1) each, whose sum is nearly exact.

    None of them is infinite. flash-attn 2 and 3 walk over blocks of keys and look for a maximum of -inf only in blocks that a
    mask cuts; two blocks of nothing but -inf before the first key that counts give exp2(-inf + inf), which is NaN. A hidden key
    gets the most negative logit that both channels together can give instead. Finite biases of any size are held to half of
    that, so beside any other key a hidden one has a weight of exactly 0: its logit is lower by 4e37 / unit, in fp16 by 65,504,
    where exp() ends at a difference of 104 in fp32 and of 746 in fp64. (In fp16 that takes logits of the other keys that stay
    above -64,000; beyond that fp16 has no digits left for attention.) Rows that see hidden keys only come out finite, and are
    marked by `seen`.
    """
    # An eighth: two channels, scale * unit (below 2) and the log2(e) of kernels that use exp2 stay finite in fp32 together.
    unit = _unit(scale, k.dtype)
    largest = min(torch.finfo(k.dtype).max, torch.finfo(torch.float32).max / 8 / max(1.0, unit))
    hidden = (bias == -torch.inf).repeat_interleave(k.shape[1] // bias.shape[1], dim=1).unsqueeze(-1)
    value = (bias / (scale * unit)).clamp(-largest, largest)
    value = value.repeat_interleave(k.shape[1] // bias.shape[1], dim=1).unsqueeze(-1)
    high = value.to(k.dtype)
    low = (value - high).to(k.dtype)
    return high.masked_fill_(hidden, -largest), low.masked_fill_(hidden, -largest)


def _blind(bias: Tensor, band: Band, q: Tensor) -> Tensor:
    """(batch, heads, rows) bool: rows whose every key within the band has a bias of -inf."""
    rows, keys = q.shape[2], bias.shape[2]
    if band == FULL:
        blind = (bias == -torch.inf).all(-1, keepdim=True).expand(*bias.shape[:2], rows)
    else:
        live = pad((bias != -torch.inf).cumsum(-1), (1, 0))  # live[..., n]: keys before n that can be seen
        row = torch.arange(rows, device=bias.device)
        stop, start = (row + band.right + 1).clamp(0, keys), (row + band.left).clamp(0, keys)
        blind = live.index_select(-1, stop) == live.index_select(-1, start)
    return blind.repeat_interleave(q.shape[1] // bias.shape[1], dim=1)
