"""Calls flash-attn 3 (module `flash_attn_interface`, built from `hopper/` of the flash-attention sources), for Hopper.

It is on no package index under its own name, and two generations of its private functions exist: windows as a pair (as with
flash-attn 2.8.3.post2) or as two numbers (later). The signature decides which; any other signature raises an error.

`sm_margin` ("flash3:sm_margin=8") is how many multiprocessors its persistent kernels leave to others: NCCL's channels, which
otherwise wait until a kernel that fills the GPU has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringattn.errors import InputError
from ringattn.kernels.external import Package, parameters
from ringattn.kernels.flash import Call, Flash
from ringattn.plan.kernel_names import KERNELS

_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NOT_NEEDED = (
    *("k_new", "v_new", "qv", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)
_FORWARD = ("q", "k", "v", *_NOT_NEEDED, *_PACKED, "softmax_scale", "causal", "softcap")
_BACKWARD = (
    *("dout", "q", "k", "v", "out", "softmax_lse", *_PACKED, "sequed_q", "sequed_k"),  # this spelling is flash-attn's
    *("dq", "dk", "dv", "softmax_scale", "softcap", "deterministic"),
)
_PAIR, _TWO = ("window_size",), ("window_size_left", "window_size_right")


class Flash3(Flash):
    name = "flash3"
    generations = range(9, 10)
    options = KERNELS["flash3"].options
    package = Package(
        "flash-attn 3",
        "flash_attn_interface",
        "run `python setup.py install` in hopper/ of https://github.com/Dao-AILab/flash-attention, or make the plan with "
        "kernel='sdpa'",
        (
            {"_flash_attn_forward": (*_FORWARD, *_PAIR, "out"), "_flash_attn_backward": (*_BACKWARD, *_PAIR, "causal")},
            {"_flash_attn_forward": (*_FORWARD, *_TWO, "out_"), "_flash_attn_backward": (*_BACKWARD, *_TWO, "is_causal")},
        ),
    )

    def __init__(self, sm_margin: int = 0) -> None:
        super().__init__()
        self.sm_margin = sm_margin
        unsupported = [name for name in self.calls if "sm_margin" not in parameters(getattr(self.module, name))]
        if sm_margin and unsupported:
            raise InputError(
                f"sm_margin={sm_margin}; {', '.join(unsupported)} of the installed flash-attn 3 does not take sm_margin: "
                "make the plan with kernel='flash3', or install a later one"
            )

    def call_forward(self, call: Call) -> tuple[Tensor, Tensor]:
        arguments = dict(q=call.q, k=call.k, v=call.v, softmax_scale=call.scale, causal=call.causal, softcap=call.softcap)
        out, lse, *_ = self._call_by_name("_flash_attn_forward", call, arguments)
        return out, lse

    def call_backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = call[:3]
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        arguments = dict(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=deterministic)
        arguments |= dict(softmax_scale=call.scale, softcap=call.softcap, causal=call.causal, is_causal=call.causal)
        self._call_by_name("_flash_attn_backward", call, arguments)
        return dq, dk, dv

    def _call_by_name(self, function: str, call: Call, arguments: dict[str, Any]) -> Any:
        """Call `function` with exactly the keywords of this generation; missing arguments are None."""
        left, right = call.window
        arguments = arguments | dict(window_size=call.window, window_size_left=left, window_size_right=right)
        if call.lengths is not None:
            arguments |= dict(zip(_PACKED, call.lengths, strict=True))
        margin = {"sm_margin": self.sm_margin} if self.sm_margin else {}
        return getattr(self.module, function)(**{keyword: arguments.get(keyword) for keyword in self.calls[function]}, **margin)
