"""Computes attention in plain mathematics: any device, dtype, band and option. Slow, quadratic in memory, obviously right.

It computes in float32, or float64 for float64 input, whatever autocast says. The other kernels are tested against it, and use
it for what their fused operators do not support (softcap on aten).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.lse import Partial, accum_dtype
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import FULL


def band_mask(rows: int, keys: int, band: Band, device: torch.device) -> Tensor:
    """(rows, keys) bool, True within the band; band relative to local indices."""
    offset = torch.arange(keys, device=device).unsqueeze(0) - torch.arange(rows, device=device).unsqueeze(1)
    return (offset >= band.left) & (offset <= band.right)


class Reference(Kernel):
    name = "reference"

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        q, k, v, bias = block
        logits, _ = _logits(q, k, bias, band, options)
        peak = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - peak.masked_fill(peak == -torch.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        out = weights @ _repeat(v, q) / total.masked_fill(total == 0, 1.0)
        return Partial(out, (peak + total.log()).squeeze(-1))

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        q, k, v, bias = block
        logits, capped = _logits(q, k, bias, band, options)
        probs = torch.exp(logits - rows.lse.unsqueeze(-1))
        dout = rows.dout.to(probs.dtype)
        dlogits = probs * (dout @ _repeat(v, q).mT - rows.delta.unsqueeze(-1))
        dbias = None if bias is None else _group_sum(dlogits.sum(2), bias)
        if capped is not None and options.softcap is not None:
            dlogits = dlogits * (1 - (capped / options.softcap) ** 2)
        dq = options.scale * (dlogits @ _repeat(k, q))
        dk = options.scale * _group_sum(dlogits.mT @ q.to(probs.dtype), k)
        return Grads(dq, dk, _group_sum(probs.mT @ dout, v), dbias)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, band: Band, options: Options) -> tuple[Tensor, Tensor | None]:
    """(batch, heads, rows, keys) in the accumulation dtype, -inf where masked; and the capped logits, if there is a cap."""
    logits = options.scale * (q.to(accum_dtype(q.dtype)) @ _repeat(k, q).mT)
    capped = None
    if options.softcap is not None:
        logits = capped = options.softcap * torch.tanh(logits / options.softcap)
    if bias is not None:
        bias = bias.repeat_interleave(q.shape[1] // bias.shape[1], dim=1)
        logits = logits + bias.to(logits.dtype).unsqueeze(2)
    if band != FULL:
        logits = logits.masked_fill(~band_mask(q.shape[2], k.shape[2], band, q.device), -torch.inf)
    return logits, capped


def _repeat(kv: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated to the number of query heads, in the accumulation dtype."""
    return kv.to(accum_dtype(q.dtype)).repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _group_sum(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the query heads that share a KV head."""
    summed: Tensor = grad.unflatten(1, (like.shape[1], -1)).sum(2)
    return summed
