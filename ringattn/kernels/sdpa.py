"""torch's fused attention operators as a kernel: the default on every device, since they are always there.

What they lack (bias, backward from delta, rows that see nothing) is made good by `fit`. A band needs an explicit mask, which is
built for a few hundred rows at a time, so memory and work grow with rows * window; the flash-attn packages (`flash`) take bands
as they are. Softcap no operator has: `reference` computes it, in memory that grows with rows * keys.

`sdpa` lets `aten.choose` find the operator; `cudnn` insists on cuDNN's wherever it can be had.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.kernels.aten import CUDNN, HALF, Call, Fused, choose
from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.fit import bias_grad, seen, widen, with_bias
from ringattn.kernels.reference import Reference, band_mask
from ringattn.mask import Band
from ringattn.partial import Partial
from ringattn.pieces import CAUSAL, FULL, Piece, strips

ROWS_PER_MASK = 512


class Sdpa(Kernel):
    name = "sdpa"
    needs_out = True

    def operator(self, q: Tensor, *, needs_mask: bool) -> Fused | None:
        return choose(q, needs_mask=needs_mask)

    def refine(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        return [
            part for piece in pieces for part in ([piece] if piece.band in (FULL, CAUSAL) else strips(piece, ROWS_PER_MASK))
        ]

    def piece_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        fused = self._fused(block.q, band, options)
        if fused is None:
            return Reference().piece_forward(block, band, options)
        out, lse = fused.forward(_call(block, band, options))
        return seen(_first(out, block.v.shape[-1]), lse, block, band)

    def piece_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        q, _, v, bias = block
        dout, lse = rows.dout, rows.lse
        fused = self._fused(q, band, options)
        if fused is None:
            return Reference().piece_backward(block, rows, band, options)
        call = _call(block, band, options)
        width = call.q.shape[-1]
        dq, dk, dv = fused.backward(call, widen(dout, width), widen(rows.any_out, width), lse)
        dim = q.shape[-1]
        dbias = None if bias is None else bias_grad(dk, dim, bias, options.scale)
        return Grads(_first(dq, dim), _first(dk, dim), _first(dv, v.shape[-1]), dbias)

    def _fused(self, q: Tensor, band: Band, options: Options) -> Fused | None:
        return None if options.softcap is not None else self.operator(q, needs_mask=band not in (FULL, CAUSAL))


class Cudnn(Sdpa):
    name = "cudnn"

    def operator(self, q: Tensor, *, needs_mask: bool) -> Fused | None:
        there = q.device.type == "cuda" and q.dtype in HALF
        return CUDNN if there else super().operator(q, needs_mask=needs_mask)


def _call(block: Operands, band: Band, options: Options) -> Call:
    """The fused call for one piece: bias as two more channels, head sizes made equal, a mask only for a band."""
    q, k, v, bias = block
    if bias is not None:
        q, k = with_bias(q, k, bias, options.scale)
    width = max(q.shape[-1], v.shape[-1])
    mask = None
    if band not in (FULL, CAUSAL):
        keep = band_mask(q.shape[2], k.shape[2], band, q.device)
        mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(keep.logical_not(), -torch.inf)
    return Call(widen(q, width), widen(k, width), widen(v, width), mask, band == CAUSAL, options.scale)


def _first(x: Tensor, width: int) -> Tensor:
    return x.narrow(-1, 0, width)
