"""Adds a kernel that computes in float64 whatever it is given: to find out what rounding has to do with a difference."""

import torch
from torch import Tensor

from ringattn.kernels import Grads, Kernel, KernelCall, Operands, Options, Partial, Rows, register
from ringattn.sequence import Band


@register
class Double(Kernel):
    """Computes in float64; slow, and quadratic in memory."""

    name = "double"

    @classmethod
    def unsupported_reason(cls, call: KernelCall) -> str | None:
        if call.softcap:
            return "kernel 'double' has no softcap"
        return "kernel 'double' needs float64, which MPS has not" if call.device.type == "mps" else None

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        q, _, v, _ = block
        logits = _logits(block, band, options)
        lse = logits.logsumexp(-1)  # -inf where a bias hides every key of a row
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
        return Partial((weights @ _for_queries(v, q)).to(q.dtype), lse.to(_sums(q.dtype)))

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        q, k, v, bias = block
        weights = torch.exp(_logits(block, band, options) - rows.lse.double().unsqueeze(-1))  # of all keys, not of this block's
        dout = rows.dout.double()
        dlogits = weights * (dout @ _for_queries(v, q).mT - rows.delta.double().unsqueeze(-1))
        dq = options.scale * (dlogits @ _for_queries(k, q))
        dk = options.scale * _for_keys(dlogits.mT @ q.double(), k)
        dv = _for_keys(weights.mT @ dout, v)
        dbias = None if bias is None else _for_keys(dlogits.sum(2), bias).to(bias.dtype)
        return Grads(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias)


def _logits(block: Operands, band: Band, options: Options) -> Tensor:
    """(batch, heads, rows, keys); -inf where the band does not keep."""
    q, k, _, bias = block
    logits = options.scale * (q.double() @ _for_queries(k, q).mT)
    if bias is not None:
        logits = logits + _for_queries(bias, q).unsqueeze(2)
    rows, keys = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    offset = keys - rows.unsqueeze(1)
    return logits.masked_fill((offset < band.left) | (offset > band.right), -torch.inf)


def _for_queries(kv: Tensor, q: Tensor) -> Tensor:
    """Each KV head for all query heads that share it."""
    return kv.double().repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _for_keys(grad: Tensor, kv: Tensor) -> Tensor:
    return grad.unflatten(1, (kv.shape[1], -1)).sum(2)


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
