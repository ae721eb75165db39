"""ring-attention-pytorch (https://github.com/lucidrains/ring-attention-pytorch): a KV ring, striped under a causal mask.

Run is its accelerator path, with the local kernel in place of its Triton kernel; its CPU path multiplies whole blocks of
logits with einsum and would be compared for that, not for its ring. Each hop is waited for before the next block is computed
and ends in a barrier: that is the library's, and stays. It rounds fp32 to fp16 by itself, so it is run in 16 bits only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from peers.base import Attention, Peer, Setting, cut, only_causal, sixteen_bits
from peers.local import Emulated, Local, choose, merge

PACKAGE = "ring_attention_pytorch"


def peers(setting: Setting) -> Iterator[Peer]:
    yield Peer("ring-attention-pytorch ring", PACKAGE, cut("contiguous"), sixteen_bits, partial(_build, False))
    yield Peer("ring-attention-pytorch striped", PACKAGE, cut("striped"), _demands, partial(_build, True))


def _demands(setting: Setting) -> str | None:
    return sixteen_bits(setting) or only_causal(setting)


def _build(striped: bool, setting: Setting) -> Attention:
    ring = _library(choose(setting.flops))
    groups = (setting.kv_heads, setting.heads // setting.kv_heads)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its query head n belongs to KV head n % kv_heads, everybody else's to n // groups.
        q = q.unflatten(2, groups).transpose(2, 3).flatten(2, 3) if groups[1] > 1 else q
        out: Tensor = ring.ring_flash_attn_cuda(q, k, v, causal=setting.causal, ring_reduce_col=True, striped_ring_attn=striped)
        if groups[1] > 1:
            out = out.unflatten(2, groups[::-1]).transpose(2, 3).flatten(2, 3)
        return out

    return attention


def _library(local: Local) -> Any:
    """The module with the ring, made to run on a CPU."""
    kernel: Any = ModuleType(f"{PACKAGE}.triton_flash_attn")
    kernel.flash_attn_forward, kernel.flash_attn_backward = partial(_forward, local), partial(_backward, local)
    sys.modules[kernel.__name__] = kernel
    from ring_attention_pytorch import ring
    from ring_attention_pytorch import ring_flash_attention_cuda as library

    # Its one use of `all` is to assert that the tensors are on a GPU.
    library.all = lambda tests: True
    # `ring_pass` returns what came and what was sent. Its backward (0.5.20) takes that pair for dk and dv, both twice as large
    # as they should be, and autograd sums them to size: wrong gradients, no error. What came is what is meant.
    library.ring_pass = lambda *args: ring.ring_pass(*args)[0]
    return library


def _forward(
    local: Local,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    o: Tensor | None,
    m: Tensor | None,
    lse: Tensor | None,
    causal: bool,
    causal_mask_diagonal: bool,
    softmax_scale: float,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block, merged into what there was. The output is kept normalised, so m, which it is yet to be scaled by, is lse."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    first = 1 if causal_mask_diagonal else 0  # each row sees one key less: the first row none
    keys, values = (x[:, :, : x.shape[2] - first] for x in (k, v))
    part, part_lse = local.forward(q[:, :, first:], keys, values, causal, softmax_scale)
    if o is None or lse is None:
        return part.transpose(1, 2), part_lse, part_lse
    if isinstance(local, Emulated):
        return o, lse, lse  # a part of its kernel, so its time is within the kernel's
    rows = slice(first, None)
    merged, merged_lse = merge(o.transpose(1, 2)[:, :, rows], lse[:, :, rows], part, part_lse)
    o[:, rows], lse[:, :, rows] = merged.transpose(1, 2), merged_lse
    return o, lse, lse


def _backward(
    local: Local,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    causal: bool,
    causal_mask_diagonal: bool,
    softmax_scale: float,
    **rest: Any,
) -> None:
    first = 1 if causal_mask_diagonal else 0
    dout, queries, out = (x.transpose(1, 2)[:, :, first:] for x in (do, q, o))
    keys, values = (x.transpose(1, 2)[:, :, : x.shape[1] - first] for x in (k, v))
    grads = local.backward(dout, queries, keys, values, out, lse[:, :, first:], causal, softmax_scale)
    kept = (slice(first, None), *[slice(k.shape[1] - first)] * 2)
    for whole, part, grad in zip((dq, dk, dv), kept, grads, strict=True):
        if first:
            whole.zero_()
        whole[:, part] = grad.transpose(1, 2)
