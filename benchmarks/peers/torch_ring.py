"""torch's own context parallelism: the templated ring behind `torch.distributed.tensor.experimental.context_parallel`.

    alltoall      K and V hop to the next rank, as one all-to-all per step
    allgather     K and V are gathered once; torch's default

`context_parallel` itself does not run on CPUs (torch 2.13: no sharding strategy for the CPU's attention operator), so the
template below it is called, with the local kernel as the operator that it takes as an argument. Under a causal mask its load
balancing is on, which is its default and the zigzag layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peers.base import Attention, Peer, Setting, two_halves
from peers.local import Local, choose
from ringattn.sequence import LAYOUTS, Layout

ROWS = 2  # the dimension of the sequence


def peers(setting: Setting) -> Iterator[Peer]:
    for method in ("alltoall", "allgather"):
        yield Peer(f"torch context parallel, {method}", "torch", _layout, _demands, partial(_build, method))


def _layout(setting: Setting) -> Layout:
    return LAYOUTS["zigzag" if setting.causal else "contiguous"](setting.seq_len, setting.world)


def _demands(setting: Setting) -> str | None:
    return two_halves(setting) if setting.causal else None


def _build(method: str, setting: Setting) -> Attention:
    local = choose(setting.flops)
    return lambda q, k, v: _Ring.apply(q, k, v, local, method, setting.causal)


class _Ring(torch.autograd.Function):
    """What torch's dispatcher makes of its attention operator and that operator's backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, local: Local, method: str, causal: bool) -> Tensor:
        ring = _configured(method, causal)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        out, lse = ring._templated_ring_attention(
            dist.group.WORLD, ROWS, partial(_forward, local), q, k, v, is_causal=causal, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = local, method, causal, scale
        rows: Tensor = out.transpose(1, 2)
        return rows

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        local, method, causal, scale = ctx.given
        ring = _configured(method, causal)
        grads = ring._templated_ring_attention_backward(
            dist.group.WORLD,
            ROWS,
            partial(_backward, local),
            dout.transpose(1, 2),
            "dout",
            *ctx.saved_tensors,
            is_causal=causal,
            scale=scale,
        )
        return *(grad.transpose(1, 2) for grad in grads), None, None, None


def _forward(local: Local, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return local.forward(q, k, v, is_causal, scale)


def _backward(
    local: Local,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dout: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    return local.backward(dout, query, key, value, out, logsumexp, is_causal, scale)


def _configured(method: str, causal: bool) -> Any:
    """The module, whose options are global to the process."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    ring.set_rotate_method(method)
    ring._cp_options.enable_load_balance = causal
    return ring
