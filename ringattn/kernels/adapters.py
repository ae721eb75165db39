"""Adapts calls to fused operators: a per-key bias, empty rows, any head size, any memory layout.

- Fused operators have no per-key bias with a gradient. Two extra channels carry it (k gets the bias as a high and a low half, q
  a constant that cancels the scale); the scale stays that of the true head_dim, and the channel's gradient is the bias's.
- For a row whose keys are all masked they return an lse of 0 or +inf instead of -inf, which would win every merge. Such rows
  are found and set to out 0 and lse -inf.
- Head sizes are padded to the same size, or to multiples of 8, with zeros, which change neither logits nor outputs. CUDA
  operators read 16 bytes at a time: received tensors, which are packed tightly, are copied to aligned memory.

No operator is called here: the kernels `sdpa` and `flash` call these functions before and after their operators.
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
    """Add two channels to q and k that add the bias to the logits."""
    high, low = _halves(bias, k, scale)
    q = torch.cat([q, q.new_full((*q.shape[:-1], 2), _unit(scale, k.dtype))], dim=-1)
    return q, torch.cat([k, high, low], dim=-1)


def bias_grad(dk: Tensor, dim: int, bias: Tensor, scale: float) -> Tensor:
    """The gradient of the bias, which is in channel `dim` of dk."""
    wide = dk.select(-1, dim).to(accum_dtype(dk.dtype))
    summed: Tensor = wide.unflatten(1, (bias.shape[1], -1)).sum(2) / (scale * _unit(scale, dk.dtype))
    return summed


def mask_empty_rows(out: Tensor, lse: Tensor, block: Operands, band: Band) -> Partial:
    """The operator's result with out 0 and lse -inf in rows that attend to no key."""
    if block.bias is None:
        return Partial(out, lse)
    empty = _empty_rows(block.bias, band, block.q)
    return Partial(out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf))


def pad_head_dim(x: Tensor, width: int) -> Tensor:
    """Pad head_dim with zeros to `width`, in the memory layout that operators assume without a check."""
    return pad(_readable(x), (0, width - x.shape[-1])) if x.shape[-1] < width else _readable(x)


def up_to(multiple: int, size: int) -> int:
    return size + -size % multiple


def _readable(x: Tensor) -> Tensor:
    """Copy `x` unless its last dimension is contiguous and, on CUDA, every row starts at a multiple of 16 bytes."""
    if x.stride(-1) != 1:
        return x.contiguous()
    if x.device.type != "cuda":
        return x
    steps = [x.storage_offset(), *(stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)]
    if all(step * x.element_size() % 16 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unit(scale: float, dtype: torch.dtype) -> float:
    """The value of q in the channels of the bias: a power of two, exact in any dtype, with scale * unit between 1 and 2.

    Smaller where `dtype` ends before that (fp16 at 2^15, for scales below 2^-15).
    """
    return 2.0 ** min(ceil(-log2(scale)), floor(log2(torch.finfo(dtype).max)))


def _halves(bias: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bias of each key as two numbers in k's dtype, (batch, kv_heads, keys, 1) each, whose sum is nearly exact.

    None of them is infinite. flash-attn 2 and 3 iterate over blocks of keys and handle a maximum of -inf only in blocks that a
    mask cuts; two blocks of only -inf before the first visible key give exp2(-inf + inf), which is NaN. Instead, a hidden key
    gets the most negative logit that both channels together can represent. Finite biases are clamped to half of that, so beside
    any other key a hidden one has a weight of exactly 0: its logit is lower by 4e37 / unit, in fp16 by 65,504, where exp() ends
    at a difference of 104 in fp32 and of 746 in fp64. (In fp16 that requires logits of the other keys above -64,000; beyond
    that fp16 has no digits left for attention.) Rows with hidden keys only have finite results, which `mask_empty_rows` masks.
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


def _empty_rows(bias: Tensor, band: Band, q: Tensor) -> Tensor:
    """(batch, heads, rows) bool: True for rows in which every key within the band has a bias of -inf."""
    rows, keys = q.shape[2], bias.shape[2]
    if band == FULL:
        empty = (bias == -torch.inf).all(-1, keepdim=True).expand(*bias.shape[:2], rows)
    else:
        live = pad((bias != -torch.inf).cumsum(-1), (1, 0))  # live[..., n]: number of visible keys before n
        row = torch.arange(rows, device=bias.device)
        stop, start = (row + band.right + 1).clamp(0, keys), (row + band.left).clamp(0, keys)
        empty = live.index_select(-1, stop) == live.index_select(-1, start)
    return empty.repeat_interleave(q.shape[1] // bias.shape[1], dim=1)
