"""Calls flash-attn 2 (`pip install flash-attn`), for Ampere and later, below its autograd functions.

These functions take out and lse of the whole row in backward, which a block of keys needs to compute its share. Names and order
are those of 2.7 and 2.8 (read in 2.8.3.post2). They return lse +inf for a row that attends to no key; `adapters` corrects that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.external import Package
from ringattn.kernels.flash import Call, Flash

_SHARED = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = ("q", "k", "v", *_SHARED, "return_softmax")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_SHARED, "deterministic")


class Flash2(Flash):
    name = "flash2"
    generations = range(8, 10)
    package = Package(
        "flash-attn 2",
        "flash_attn.flash_attn_interface",
        "run `pip install flash-attn --no-build-isolation`, or make the plan with kernel='sdpa'",
        (
            {
                "_flash_attn_forward": _FORWARD,
                "_flash_attn_varlen_forward": (*_FORWARD, *_PACKED),
                "_flash_attn_backward": _BACKWARD,
                "_flash_attn_varlen_backward": (*_BACKWARD, *_PACKED),
            },
        ),
    )

    def call_forward(self, call: Call) -> tuple[Tensor, Tensor]:
        name = "_flash_attn_forward" if call.lengths is None else "_flash_attn_varlen_forward"
        out, lse, *_ = getattr(self.module, name)(q=call.q, k=call.k, v=call.v, return_softmax=False, **_options(call))
        return out, lse

    def call_backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        name = "_flash_attn_backward" if call.lengths is None else "_flash_attn_varlen_backward"
        q, k, v = call[:3]
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        arguments = dict(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=deterministic)
        getattr(self.module, name)(**arguments, **_options(call))
        return dq, dk, dv


def _options(call: Call) -> dict[str, Any]:
    values = (0.0, call.scale, call.causal, *call.window, call.softcap, None)
    options = dict(zip(_SHARED, values, strict=True))
    return options if call.lengths is None else options | dict(zip(_PACKED, call.lengths, strict=True))
