"""Tells which kernel fits: why one cannot compute a call, which operator a call will use, and which kernel is worth a try.

`obstacle` is asked before a call sends anything, `resolved` names what ranks must agree on. `pick` is for people, through
`ringattn doctor`: its order is that of the packages' own claims for each generation of GPU. What is fastest on the GPU at hand
`ranking` measures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringattn.errors import InputError
from ringattn.kernels import Emulated, get
from ringattn.kernels.operator_choice import (
    HALF,
    LARGEST_CUDNN,
    LARGEST_FLASH,
    CallShape,
    Facts,
    call_width,
    chosen,
    cudnn_takes,
    efficient_takes,
    facts,
    flash_takes,
)

# By kernel: the generations of GPU it is for (major compute capability), and its largest head size.
GPUS = {"flash2": range(8, 10), "flash3": range(9, 10), "flash4": range(9, 13)}
LARGEST = {"flash2": 256, "flash3": 256, "flash4": 256, "cudnn": LARGEST_CUDNN, "flash": LARGEST_FLASH}
LARGEST_ON_BLACKWELL = 128  # of flash4, but for 256 with 256 and 192 with 128
FUSED_BY_TORCH = ("sdpa", "cudnn", "flash", "efficient")
ANYWHERE = ("sdpa", "reference", Emulated.name)
CURE = "make the plan with kernel='sdpa'"


class Pick(NamedTuple):
    name: str
    why: str


def resolved(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    heads: int,
    *,
    bias: bool = False,
    softcap: bool = False,
    bands: bool = False,
) -> str:
    """The operator that computes a call of kernel `name`: "cpu", "cudnn", "flash", "efficient", "reference", or `name` itself.

    It depends on nothing but these arguments, the GPU, torch, and torch's settings, so tiles of one call differ in it only as
    their shapes do (a band, with `bands`; a single key, which cuDNN does not take), and a call repeated has the same. A few
    microseconds; to be compared among ranks before a call.
    """
    kernel = name.partition(":")[0]
    if kernel in FUSED_BY_TORCH:
        width = call_width(head_dim, value_dim, bias=bias)
        return "reference" if softcap else chosen(kernel, device, CallShape(dtype, width, 2, bands, heads))
    # The channels of a bias would be capped too (see `flash`).
    return "reference" if kernel in GPUS and bias and softcap else name


def obstacle(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    *,
    bias: bool = False,
    generation: int | None = None,
) -> str | None:
    """Why the kernel `name` cannot compute this here, and the cure; or None. `generation` is the device's if not given."""
    kernel = name.partition(":")[0]
    if kernel in ANYWHERE:
        return None
    short = str(dtype).removeprefix("torch.")
    value_dim = head_dim if value_dim is None else value_dim
    if kernel == "flex":
        if device.type == "cuda" and dtype == torch.float64:
            return f"kernel 'flex' takes no float64 on CUDA; {CURE}"
    else:
        if device.type != "cuda":
            return f"kernel {name!r} runs on CUDA and the tensors are on {device.type}; {CURE}"
        takes = (*HALF, torch.float32) if kernel == "efficient" else HALF
        if dtype not in takes:
            listed = "bfloat16, float16 and float32" if kernel == "efficient" else "bfloat16 and float16"
            return f"kernel {name!r} takes {listed}, not {short}; {CURE}"
        if why := _too_large(kernel, head_dim, value_dim, bias):
            return f"{why}; {CURE}"
        found = facts(device)
        found = found if generation is None else found._replace(capability=(generation, 0))
        unfit = _unfit_operator if kernel in FUSED_BY_TORCH else _unfit_package
        if why := unfit(kernel, dtype, head_dim, value_dim, bias, found):
            return f"{why}; {CURE}"
    try:
        get(name)
    except InputError as error:
        return f"kernel {name!r}: {error}"
    return None


def _too_large(kernel: str, head_dim: int, value_dim: int, bias: bool) -> str | None:
    """By the width of the call: what a bias adds counts, and sizes are filled up to a multiple of 8."""
    largest = LARGEST.get(kernel)
    if largest is None or call_width(head_dim, value_dim, bias=bias) <= largest:
        return None
    bias_too = " and 2 for the bias" if bias else ""
    return f"kernel {kernel!r} takes head sizes up to {largest}, and there are {max(head_dim, value_dim)}{bias_too}"


def _unfit_operator(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int, bias: bool, found: Facts) -> str | None:
    if kernel == "cudnn" and found.deterministic:
        return "kernel 'cudnn' has no deterministic backward, and torch.use_deterministic_algorithms(True) asks for one"
    shape = CallShape(dtype, call_width(head_dim, value_dim, bias=bias), 2)
    takes = {"cudnn": cudnn_takes, "flash": flash_takes}.get(kernel)
    if efficient_takes(shape, found) and (takes is None or takes(shape, found)):
        return None
    major, minor = found.capability
    cudnn = f" and cuDNN {found.cudnn}" if kernel == "cudnn" else ""
    size = f"head size {shape.width} in {str(dtype).removeprefix('torch.')}"
    return f"torch's operator {kernel!r} does not take {size} with compute capability {major}.{minor}{cudnn}"


def _unfit_package(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int, bias: bool, found: Facts) -> str | None:
    generation = found.capability[0]
    if generation not in GPUS[kernel]:
        return f"kernel {kernel!r} is for compute capability {GPUS[kernel][0]} to {GPUS[kernel][-1]}, and this is {generation}"
    sizes = (call_width(head_dim, 0, bias=bias), call_width(0, value_dim, bias=False))
    if kernel == "flash4" and generation in (10, 11) and max(sizes) > LARGEST_ON_BLACKWELL and sizes not in _BLACKWELL_TOO:
        return f"kernel 'flash4' takes head sizes up to {LARGEST_ON_BLACKWELL} on this GPU, 192 with 128, or 256"
    return None


_BLACKWELL_TOO = ((256, 256), (192, 128))


def pick(device: torch.device | str, dtype: torch.dtype, head_dim: int, *, bias: bool = False, softcap: bool = False) -> Pick:
    """The kernel for these tensors among those that run here, and why it is that one."""
    device = torch.device(device)
    for name, why in _RANKING:
        # flash-attn leaves bias and softcap together to plain mathematics
        wanted = softcap if name == "flex" else not (bias and softcap)
        if device.type == "cuda" and wanted and obstacle(name, device, dtype, head_dim, bias=bias) is None:
            return Pick(name, why)
    return Pick("sdpa", f"torch's own fused operators; no other kernel that runs here on {device.type} is known to be faster")


_RANKING = (
    ("flash3", "flash-attn 3 is installed, and is made for this GPU"),
    ("flash4", "flash-attn 4 is installed, and is made for this GPU"),
    ("flash2", "flash-attn 2 is installed: bands as windows, many documents in one call"),
    ("flex", "of what is installed only flex fuses softcap"),
)
