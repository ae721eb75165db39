"""Tells which kernel fits: why one cannot compute a call, which operator a call uses, and which kernel is recommended.

`unsupported_reason` is called before a call sends anything; ranks agree on the result of `resolved`. `pick` is for people, in
`ringattn doctor`: its order follows the packages' own claims for each generation of GPU. `ranking` measures which is fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringattn._validation import definition_of
from ringattn.errors import InputError
from ringattn.kernels import class_of, get
from ringattn.kernels.base import KernelCall
from ringattn.plan.kernel_names import KERNELS as NAMES

HINT = "make the plan with kernel='sdpa'"


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

    It depends only on these arguments, the GPU, torch, and torch's settings, so tiles of one call differ in it only as their
    shapes do (a band, with `bands`; a single key, which cuDNN does not take), and a repeated call has the same. Takes a few
    microseconds; ranks compare it before a call.
    """
    kernel = class_of(name)
    call = KernelCall(device, dtype, head_dim, value_dim, heads, bias, softcap, bands)
    operator = kernel.operator_of(call)
    if operator != kernel.name:
        return operator
    return name if kernel.name in NAMES.built_in or kernel.name not in NAMES else f"{name}, which is {definition_of(kernel)}"


def unsupported_reason(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    *,
    bias: bool = False,
    softcap: bool = False,
    generation: int | None = None,
) -> str | None:
    """Why the kernel `name` cannot compute this here, with a hint; or None. `generation` is the device's if not given."""
    value_dim = head_dim if value_dim is None else value_dim
    call = KernelCall(device, dtype, head_dim, value_dim, 1, bias, softcap, generation=generation)
    try:
        if reason := class_of(name).unsupported_reason(call):
            return f"{reason}; {HINT}"
        get(name)
    except InputError as error:
        return f"kernel {name!r}: {error}"
    return None


def pick(device: torch.device | str, dtype: torch.dtype, head_dim: int, *, bias: bool = False, softcap: bool = False) -> Pick:
    """The recommended kernel for these tensors among those that run here, and the reason."""
    device = torch.device(device)
    for name, why in _RANKING:
        # flash-attn computes bias and softcap together with the reference
        suitable = softcap if name == "flex" else not (bias and softcap)
        if device.type == "cuda" and suitable and unsupported_reason(name, device, dtype, head_dim, bias=bias) is None:
            return Pick(name, why)
    return Pick("sdpa", f"torch's own fused operators; no other kernel that runs here on {device.type} is known to be faster")


_RANKING = (
    ("flash3", "flash-attn 3 is installed, and is made for this GPU"),
    ("flash4", "flash-attn 4 is installed, and is made for this GPU"),
    ("flash2", "flash-attn 2 is installed: bands as windows, many documents in one call"),
    ("flex", "of what is installed only flex fuses softcap"),
)
