"""Makes the models of transformers compute in fp64 throughout, so that a difference is either rounding of fp64 or a fault.

Many models compute norms, rotary tables, softmax and routers in fp32 by name. Where two orders of the same sum differ in the
last bit of fp64, such a step may round to two fp32 numbers, and what is wrong by 1e-7 could not be told from what is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MODELS = "/transformers/"
LIBRARY = "/torch/"


class Double(TorchFunctionMode):
    """Within it, what code of transformers asks for in fp32 is fp64; code of others is left alone.

    Going backward is itself a call that the mode handles, and while it handles one it is off: recomputed layers enter it again,
    by `context_fn` of torch.utils.checkpoint.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not _called_by_a_model(sys._getframe(1)):
            return func(*args, **named)
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.full and named.get("dtype") is None and isinstance(args[1] if len(args) > 1 else None, float):
            named["dtype"] = torch.float64
        result = func(*map(_doubled, args), **{name: _doubled(value) for name, value in named.items()})
        if isinstance(result, torch.Tensor) and result.dtype is torch.float32:  # a default dtype, of a factory
            return result.double()
        return result


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _called_by_a_model(frame: FrameType | None) -> bool:
    """Whether the nearest caller outside torch is code of transformers."""
    while frame is not None and LIBRARY in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and MODELS in frame.f_code.co_filename
