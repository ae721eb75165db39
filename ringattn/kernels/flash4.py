"""Calls flash-attn 4 (`pip install flash-attn-4`), written in CuTe, for Hopper and Blackwell, below its autograd functions.

Names are those of 4.0.0b36, an alpha: if its parameters change, an error names it. An unbounded side of a window is None, and v
may have its own head size, as in DeepSeek's 192 and 128.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.base import KernelCall
from ringattn.kernels.external import Package
from ringattn.kernels.flash import ANY, Call, Flash
from ringattn.kernels.operator_choice import Facts, call_width

_SHARED = ("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right")
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

LARGEST_ON_BLACKWELL = 128  # but for 256 with 256 and 192 with 128


class Flash4(Flash):
    name = "flash4"
    generations = range(9, 13)
    one_head_dim = False
    package = Package(
        "flash-attn 4",
        "flash_attn.cute.interface",
        "run `pip install --pre flash-attn-4`, or make the plan with kernel='sdpa'",
        (
            {
                "_flash_attn_fwd": ("q", "k", "v", *_SHARED, *_PACKED, "return_lse"),
                "_flash_attn_bwd": ("q", "k", "v", "out", "dout", "lse", *_SHARED, *_PACKED, "deterministic"),
            },
        ),
    )

    @classmethod
    def unsupported_on_device(cls, call: KernelCall, device: Facts) -> str | None:
        sizes = (call_width(call.head_dim, 0, bias=call.bias), call_width(0, call.value_dim, bias=False))
        blackwell = device.capability[0] in (10, 11)
        if blackwell and max(sizes) > LARGEST_ON_BLACKWELL and sizes not in ((256, 256), (192, 128)):
            return f"kernel 'flash4' takes head sizes up to {LARGEST_ON_BLACKWELL} on this GPU, 192 with 128, or 256"
        return super().unsupported_on_device(call, device)

    def call_forward(self, call: Call) -> tuple[Tensor, Tensor]:
        q, k, v = call[:3]
        out, lse, *_ = self.module._flash_attn_fwd(q=q, k=k, v=v, return_lse=True, **_options(call))
        return out, lse

    def call_backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        arguments = dict(q=call.q, k=call.k, v=call.v, out=out, dout=dout, lse=lse)
        deterministic = torch.are_deterministic_algorithms_enabled()
        dq, dk, dv, *_ = self.module._flash_attn_bwd(**arguments, deterministic=deterministic, **_options(call))
        return dq, dk, dv


def _options(call: Call) -> dict[str, Any]:
    left, right = (None if side == ANY else side for side in call.window)
    options = dict(zip(_SHARED, (call.scale, call.causal, call.softcap, left, right), strict=True))
    return options | dict(zip(_PACKED, call.lengths or (None,) * 4, strict=True))
