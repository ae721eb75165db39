"""torch's fused attention operators as a kernel: the default on every device.

Four things about these operators are put right here, so that nobody else need know:

- A row whose keys are all masked returns lse 0.0 instead of -inf, and would win every merge. Such rows are found and marked.
- The backward wants `out` where a block elsewhere only has delta = sum(dout * out). Any out with that delta gives the same
  gradients, so one is made from dout itself; a schedule that ships q, dout, lse and delta moves a third less than one that
  ships out as well.
- There is no per-key bias with a gradient. Two extra channels carry it (k gets the bias as a high and a low half, q a constant
  that undoes the scale); the scale stays that of the true head_dim, and the channel's gradient is that of the bias.
- A band needs an explicit mask. It is built for a few hundred rows at a time, so memory and work grow with rows * window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, copysign, log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.kernels.aten import Call, Fused, choose
from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.reference import Reference, band_mask
from ringattn.mask import Band
from ringattn.partial import Partial, accum_dtype
from ringattn.pieces import CAUSAL, FULL, Piece, strips

ROWS_PER_MASK = 512


class Sdpa(Kernel):
    name = "sdpa"

    def refine(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        return [
            part for piece in pieces for part in ([piece] if piece.band in (FULL, CAUSAL) else strips(piece, ROWS_PER_MASK))
        ]

    def piece_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        q, k, v, bias = block
        fused = _fused(q, band, options)
        if fused is None:
            return Reference().piece_forward(block, band, options)
        out, lse = fused.forward(_call(q, k, v, bias, band, options))
        if bias is not None:
            lse = lse.masked_fill(_blind(bias, band, q), -torch.inf)
        return Partial(_first(out, v.shape[-1]), lse)

    def piece_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        q, k, v, bias = block
        dout, lse, delta = rows
        fused = _fused(q, band, options)
        if fused is None:
            return Reference().piece_backward(block, rows, band, options)
        call = _call(q, k, v, bias, band, options)
        width = call.q.shape[-1]
        dq, dk, dv = fused.backward(call, _widen(dout, width), _widen(stand_in(dout, delta), width), lse)
        dim = q.shape[-1]
        dbias = None
        if bias is not None:
            dbias = dk.select(-1, dim).to(accum_dtype(q.dtype)).unflatten(1, (bias.shape[1], -1)).sum(2) / (
                options.scale * _unit(options.scale)
            )
        return Grads(_first(dq, dim), _first(dk, dim), _first(dv, v.shape[-1]), dbias)


def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """A tensor in dout's shape and dtype whose row-wise product with dout sums to delta: the multiple of dout that does.

    It is never longer than the out it stands for (Cauchy-Schwarz), so it does not overflow. Norms are taken in fp64, where the
    square of no fp32 number is lost; a row too small even so, or zero, has no gradient to speak of and gets a bounded factor.
    """
    norm: Tensor = torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float64)
    factor = (delta / norm / norm).masked_fill_(norm == 0, 0.0).clamp_(-1e37, 1e37).to(delta.dtype)
    return (dout * factor.unsqueeze(-1)).to(dout.dtype)


def _fused(q: Tensor, band: Band, options: Options) -> Fused | None:
    return None if options.softcap is not None else choose(q, needs_mask=band not in (FULL, CAUSAL))


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, band: Band, options: Options) -> Call:
    """The fused call for one piece: bias as two more channels, head sizes made equal, a mask only for a band."""
    if bias is not None:
        high, low = _halves(bias, k, options.scale)
        k = torch.cat([k, high, low], dim=-1)
        q = torch.cat([q, q.new_full((*q.shape[:-1], 2), _unit(options.scale))], dim=-1)
    width = max(q.shape[-1], v.shape[-1])
    mask = None
    if band not in (FULL, CAUSAL):
        keep = band_mask(q.shape[2], k.shape[2], band, q.device)
        mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(keep.logical_not(), -torch.inf)
    return Call(_widen(q, width), _widen(k, width), _widen(v, width), mask, band == CAUSAL, options.scale)


def _unit(scale: float) -> float:
    """What q holds in the channels of the bias: a power of two, exact in any dtype, with scale * unit between 1 and 2."""
    return 2.0 ** ceil(-log2(abs(scale)))


def _halves(bias: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The bias of each key as two numbers in k's dtype, (batch, kv_heads, keys, 1) each, whose sum is nearly exact.

    Finite biases stay finite, whatever their size: a mask of `finfo.min` must not turn into -inf, neither here nor when the
    operator multiplies it by q's unit in fp32.
    """
    largest = min(torch.finfo(k.dtype).max, torch.finfo(torch.float32).max / 4 / max(1.0, _unit(scale)))
    value = bias / (scale * _unit(scale))
    value = value.clamp(-largest, largest).masked_fill_(bias == -torch.inf, -torch.inf * copysign(1.0, scale))
    value = value.repeat_interleave(k.shape[1] // bias.shape[1], dim=1).unsqueeze(-1)
    high = value.to(k.dtype)
    return high, (value - high).masked_fill_(high.isinf(), 0.0).to(k.dtype)


def _first(x: Tensor, width: int) -> Tensor:
    return x.narrow(-1, 0, width)


def _widen(x: Tensor, width: int) -> Tensor:
    """With zeros up to `width`, and with neighbours in memory side by side, which the operators assume without looking."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _blind(bias: Tensor, band: Band, q: Tensor) -> Tensor:
    """(batch, heads, rows) bool: rows whose every key within the band has a bias of -inf."""
    rows, keys = q.shape[2], bias.shape[2]
    live = pad((bias != -torch.inf).cumsum(-1), (1, 0))  # live[..., n]: keys before n that can be seen
    row = torch.arange(rows, device=bias.device)
    stop, start = (row + band.right + 1).clamp(0, keys), (row + band.left).clamp(0, keys)
    seen = live.index_select(-1, stop) - live.index_select(-1, start)
    return (seen == 0).repeat_interleave(q.shape[1] // bias.shape[1], dim=1)
