"""Calls the fused attention operators inside torch, which return lse and whose backward takes the whole row's lse.

    cpu          aten::_scaled_dot_product_flash_attention_for_cpu    bf16, fp16, fp32, fp64; GQA natively
    flash        aten::_scaled_dot_product_flash_attention            CUDA, bf16 and fp16, full and causal; GQA natively
    cudnn        aten::_scaled_dot_product_cudnn_attention            CUDA, bf16 and fp16; GQA natively from torch 2.8 on
    efficient    aten::_scaled_dot_product_efficient_attention        CUDA, bf16, fp16, fp32; KV heads are repeated for it

`Fused` is one of these rows: its forward and backward. `operator_choice` decides which one computes a call. The CUDA rows are
checked for names, shapes and dtypes only (see docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.operator_choice import version

aten = torch.ops.aten
ALIGNED_KEYS = 16  # rows of a mask begin at multiples of this number of keys
CUDNN_SHARES_HEADS = version(torch.__version__) >= (2, 8)  # since then torch passes fewer KV heads to cuDNN as they are


class Call(NamedTuple):
    """One fused call: q, k, v of equal head_dim; `mask` is additive, (rows, keys), or None."""

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
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only under dropout
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
    q, k, v, mask = _repeated(call)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, call.causal, scale=call.scale)
    # This operator pads lse to a multiple of 32 rows.
    return out.narrow(-1, 0, call.v.shape[-1]), lse.narrow(-1, 0, call.q.shape[2])


def efficient_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = _repeated(call)
    dout, out = _pad_heads(8, dout, out)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    seed = _unused_seed(q)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, mask, out, padded, seed, seed, 0.0, [True, True, True, False], call.causal, scale=call.scale
    )
    return _contract(call, dq, dk, dv)


def cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, mask = _shared(call)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, call.causal, False, scale=call.scale)
    return out.narrow(-1, 0, call.v.shape[-1]), lse.reshape(q.shape[:3])  # torch 2.9 and later: (batch, heads, rows, 1)


def cudnn_backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = _shared(call)
    dout, out = (_rows_first(x) for x in _pad_heads(8, dout, out))
    dims = _dimensions_of_lse(aten._scaled_dot_product_cudnn_attention, q.device, q.dtype)
    seed = _unused_seed(q)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous().reshape(*q.shape[:3], *[1] * (dims - 3)),
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


@cache
def _dimensions_of_lse(operator: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> int:
    """3 or 4, as in the forward of this torch (torch 2.9 added one), which is what its backward takes. Computed once."""
    x = torch.empty(1, 1, 64, 64, device=device, dtype=dtype)
    return operator(x, x, x, None, True, 0.0, False, False, scale=1.0)[1].ndim  # type: ignore[no-any-return]


def _rows_first(x: Tensor) -> Tensor:
    """(batch, heads, rows, dim) in the memory order (batch, rows, heads, dim).

    torch caches a plan for each call of cuDNN's backward and looks it up by the strides of q, k and v, in many releases only by
    these: out and dout of a later call are then read with the strides of the first call (MHA.cpp,
    `MHACacheKeyWrapper`).
    """
    by_row = x.transpose(1, 2)
    return x if by_row.is_contiguous() else by_row.clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _unused_seed(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)  # read only under dropout


def _pad_heads(multiple: int, *tensors: Tensor) -> list[Tensor]:
    """Pad head_dim with zeros, which changes neither logits nor outputs."""
    short = -tensors[0].shape[-1] % multiple
    return [torch.nn.functional.pad(t, (0, short)) if short else t for t in tensors]


def _repeated(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Head sizes padded, KV heads repeated to the query heads, the mask for every head."""
    q, k, v = _pad_heads(8, call.q, call.k, call.v)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    return q, k, v, _for_heads(call.mask, q.shape[0], q.shape[1])


def _shared(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments of cuDNN: KV heads as they are, and one mask for all heads."""
    if not CUDNN_SHARES_HEADS:
        return _repeated(call)
    q, k, v = _pad_heads(8, call.q, call.k, call.v)
    return q, k, v, _for_heads(call.mask, q.shape[0], 1)


def _for_heads(mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """(batch, heads, rows, keys) as an expanded view: rows are aligned first, so that no head needs a copy."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    if mask.stride(-2) % ALIGNED_KEYS:
        mask = torch.nn.functional.pad(mask, (0, -keys % ALIGNED_KEYS)).narrow(-1, 0, keys)
    return mask.expand(batch, heads, *mask.shape)


def _contract(call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients without the padding, summed over the query heads that share a KV head where those were repeated."""
    dim, kv_heads = call.q.shape[-1], call.k.shape[1]
    dq, dk, dv = (grad.narrow(-1, 0, dim) for grad in (dq, dk, dv))
    if dk.shape[1] != kv_heads:
        dk, dv = (grad.unflatten(1, (kv_heads, -1)).sum(2) for grad in (dk, dv))
    return dq, dk, dv


class Fused(NamedTuple):
    """One operator pair: forward gives (out, lse), backward takes (call, dout, out, lse) and gives (dq, dk, dv)."""

    forward: Callable[[Call], tuple[Tensor, Tensor]]
    backward: Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


CPU = Fused(cpu_forward, cpu_backward)
FLASH = Fused(flash_forward, flash_backward)
EFFICIENT = Fused(efficient_forward, efficient_backward)
CUDNN = Fused(cudnn_forward, cudnn_backward)
FUSED = {"cpu": CPU, "flash": FLASH, "efficient": EFFICIENT, "cudnn": CUDNN}  # `operator_choice` may also return "reference"
