"""flash-attn's names on a CPU: this module poses as `flash_attn`, so that libraries that import it find the local kernel.

    install(0)        real, on torch's CPU operator
    install(50e9)     an emulated accelerator of 50 Gflop/s

Names, order and defaults of arguments are those of flash-attn 2.8.3 (flash_attn/flash_attn_interface.py), which peers look
at; here tensors are (batch, rows, heads, head_dim) and lse is (batch, heads, rows), fp32. Of the variable-length functions
only a single sequence is offered, which is what an unpacked batch of one is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from peers.local import Local, choose

__version__ = "2.8.3"

_local: Local = choose(0)


def install(flops: float) -> None:
    """Pose as flash-attn, on the kernel that `flops` asks for. To be called before a peer is imported; again to change it."""
    global _local
    _local = choose(flops)
    sys.modules["flash_attn"] = sys.modules["flash_attn.flash_attn_interface"] = sys.modules[__name__]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    _only_plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    out, lse = _local.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal, softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Fills dq, dk and dv. out and lse may be those of the whole rows while k and v are a part: the share is exact."""
    _only_plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = _local.backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad.transpose(1, 2))


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    _only_one(cu_seqlens_q, cu_seqlens_k)
    window = window_size_left, window_size_right
    out, lse, *_ = _flash_attn_forward(
        q[None], k[None], v[None], dropout_p, softmax_scale, causal, *window, softcap, alibi_slopes, return_softmax
    )
    return out[0], lse[0], None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    _only_one(cu_seqlens_q, cu_seqlens_k)
    tensors = [x[None] for x in (dout, q, k, v, out, softmax_lse, dq, dk, dv)]
    options = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic)
    given: tuple[Any, ...] = (*tensors, *options)
    _flash_attn_backward(*given)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = (x if n == 4 else x.transpose(1, 2) for n, x in enumerate(ctx.saved_tensors))
        grads = _local.backward(dout.transpose(1, 2), q, k, v, out, lse, ctx.causal, ctx.scale)
        return *(grad.transpose(1, 2) for grad in grads), None, None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    _only_plain(dropout_p, *window_size, softcap, alibi_slopes)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out: Tensor = _Differentiable.apply(q, k, v, causal, scale)
    return out


def _only_plain(dropout: float, left: int, right: int, softcap: float, alibi: Tensor | None) -> None:
    if dropout or softcap or alibi is not None or (left, right) != (-1, -1):
        raise ValueError("this adapter is for plain attention: call it without dropout, window, softcap and alibi slopes")


def _only_one(*cu_seqlens: Tensor) -> None:
    if any(len(ends) != 2 for ends in cu_seqlens):
        raise ValueError("this adapter takes one sequence: cu_seqlens must be (0, length)")
