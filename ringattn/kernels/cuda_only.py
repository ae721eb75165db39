"""Checks what all kernels for CUDA require: the device, the dtype, the head size and the generation of GPU."""

from __future__ import annotations

from typing import ClassVar

import torch

from ringattn.kernels.base import Kernel, KernelCall
from ringattn.kernels.operator_choice import Facts, call_width, device_facts


class CudaOnly(Kernel):
    """A kernel that runs only on CUDA devices."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    largest_head_dim: ClassVar[int | None] = None

    @classmethod
    def unsupported_reason(cls, call: KernelCall) -> str | None:
        if call.device.type != "cuda":
            return f"kernel {cls.name!r} runs on CUDA and the tensors are on {call.device.type}"
        if call.dtype not in cls.dtypes:
            *others, last = map(short_dtype, cls.dtypes)
            return f"kernel {cls.name!r} takes {', '.join(others)} and {last}, not {short_dtype(call.dtype)}"
        if cls.largest_head_dim is not None and width_of(call) > cls.largest_head_dim:
            bias_too = " and 2 for the bias" if call.bias else ""
            largest = max(call.head_dim, call.value_dim)
            return f"kernel {cls.name!r} takes head sizes up to {cls.largest_head_dim}, and there are {largest}{bias_too}"
        device = device_facts(call.device)
        return cls.unsupported_on_device(
            call, device if call.generation is None else device._replace(capability=(call.generation, 0))
        )

    @classmethod
    def unsupported_on_device(cls, call: KernelCall, device: Facts) -> str | None:
        """Why this GPU, with torch's present settings, cannot compute the call; None if it can."""
        return None


def width_of(call: KernelCall) -> int:
    """The head size of the call, including the channels of a bias, padded to a multiple of 8."""
    return call_width(call.head_dim, call.value_dim, bias=call.bias)


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
