"""The fused attention operators inside torch, which return lse and whose backward takes the whole row's lse.

    cpu                     aten::_scaled_dot_product_flash_attention_for_cpu    bf16, fp16, fp32, fp64; GQA natively
    cuda, bf16 and fp16     aten::_scaled_dot_product_flash_attention            full and causal pieces
    cuda, everything else   aten::_scaled_dot_product_efficient_attention        fp32, bands, biases
    cuda, fp64              the reference kernel
    cuda, on request        aten::_scaled_dot_product_cudnn_attention            bf16 and fp16; what the kernel "cudnn" uses

`Fused` is one of these rows: a forward, a backward, and what it can take. The kernel that chooses among them is in `sdpa`.
The CUDA rows are checked for names, shapes and dtypes only (see docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One fused call: q, k, v of equal head_dim; `mask` is additive, broadcastable to (batch, heads, rows, keys), or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


def cpu_forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.causal, attn_mask=call.mask, scale=call.scale
    )
    return out, lse


def cpu_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, call.q, call.k, call.v, out, lse, 0.0, call.causal, attn_mask=call.mask, scale=call.scale
    )
    return dq, dk, dv


def flash_forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = _pad_heads(8, call.q, call.k, call.v)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, call.causal, False, scale=call.scale)
    return out.narrow(-1, 0, call.v.shape[-1]), lse


def flash_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dim = call.q.shape[-1]
    q, k, v, dout, out = _pad_heads(8, call.q, call.k, call.v, dout, out)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),  # the operator takes its pointer and not its strides
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        call.causal,
        seed,
        seed.narrow(0, 0, 1),
        scale=call.scale,
    )
    dq, dk, dv = (grad.narrow(-1, 0, dim) for grad in grads)
    return dq, dk, dv


def efficient_forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, mask = _expand(call)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, call.causal, scale=call.scale)
    # This operator pads lse to a multiple of 32 rows.
    return out.narrow(-1, 0, call.v.shape[-1]), lse.narrow(-1, 0, call.q.shape[2])


def efficient_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = _expand(call)
    dout, out = _pad_heads(8, dout, out)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, mask, out, padded, seed, seed, 0.0, [True, True, True, False], call.causal, scale=call.scale
    )
    return _contract(call, dq, dk, dv)


def cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, mask = _expand(call)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, call.causal, False, scale=call.scale)
    return out.narrow(-1, 0, call.v.shape[-1]), lse.squeeze(-1)  # this operator gives (batch, heads, rows, 1)


def cudnn_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = _expand(call)
    dout, out = _pad_heads(8, dout, out)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous().unsqueeze(-1),
        seed,
        seed,
        mask,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        call.causal,
        scale=call.scale,
    )
    return _contract(call, dq, dk, dv)


def _pad_heads(multiple: int, *tensors: Tensor) -> list[Tensor]:
    """Pad head_dim with zeros, which changes neither logits nor outputs."""
    short = -tensors[0].shape[-1] % multiple
    return [torch.nn.functional.pad(t, (0, short)) if short else t for t in tensors]


def _expand(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Head sizes padded, KV heads repeated to the query heads, the mask in full: all as aligned as these operators ask."""
    q, k, v = _pad_heads(8, call.q, call.k, call.v)
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    if call.mask is None:
        return q, k, v, None
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    padded = torch.nn.functional.pad(call.mask.expand(batch, heads, rows, keys), (0, -keys % 16))
    return q, k, v, padded.narrow(-1, 0, keys)


def _contract(call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients without the padding, summed over the query heads that share a KV head."""
    dim, groups = call.q.shape[-1], (call.k.shape[1], -1)
    dq, dk, dv = (grad.narrow(-1, 0, dim) for grad in (dq, dk, dv))
    return dq, dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)


class Fused(NamedTuple):
    """One operator pair: forward gives (out, lse), backward takes (call, dout, out, lse) and gives (dq, dk, dv)."""

    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


CPU = Fused(cpu_forward, cpu_backward)
FLASH = Fused(flash_forward, flash_backward)
EFFICIENT = Fused(efficient_forward, efficient_backward)
CUDNN = Fused(cudnn_forward, cudnn_backward)


def choose(q: Tensor, *, needs_mask: bool) -> Fused | None:
    """The operator for these tensors, or None where torch has no fused one that returns lse."""
    if q.device.type == "cpu":
        return CPU
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return None
    return FLASH if q.dtype in HALF and not needs_mask and q.shape[-1] <= 256 else EFFICIENT
