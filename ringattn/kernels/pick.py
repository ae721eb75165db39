"""Which kernel fits: what stands in the way of one, and which of those that run is picked.

`obstacle` is asked before a call sends anything; `pick` by people, through `ringattn doctor` or to fill in
`make_plan(kernel=...)`. The order in `pick` is that of the packages' own claims for each generation of GPU and no measurement;
nothing here has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringattn.errors import InputError
from ringattn.kernels import Emulated, get
from ringattn.kernels.aten import HALF

# By kernel: the generations of GPU it is for (major compute capability), and its largest head size.
GPUS = {"flash2": range(8, 10), "flash3": range(9, 10), "flash4": range(9, 13)}
LARGEST = {"flash2": 256, "flash3": 256, "flash4": 256, "cudnn": 128}
LARGEST_ON_BLACKWELL = 128  # of flash4, but for 256 with 256 and 192 with 128
ANYWHERE = ("sdpa", "reference", Emulated.name)


class Pick(NamedTuple):
    name: str
    why: str


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
    cure = "make the plan with kernel='sdpa'"
    if kernel == "flex":
        if device.type == "cuda" and dtype == torch.float64:
            return f"kernel 'flex' takes no float64 on CUDA; {cure}"
    else:
        if device.type != "cuda":
            return f"kernel {name!r} runs on CUDA and the tensors are on {device.type}; {cure}"
        if dtype not in HALF:
            return f"kernel {name!r} takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}; {cure}"
        if why := _unfit(kernel, device, head_dim, head_dim if value_dim is None else value_dim, bias, generation):
            return f"{why}; {cure}"
    try:
        get(name)
    except InputError as error:
        return f"kernel {name!r}: {error}"
    return None


def _unfit(kernel: str, device: torch.device, head_dim: int, value_dim: int, bias: bool, generation: int | None) -> str | None:
    channels = head_dim + 2 * bias  # a bias travels in two channels more
    largest = max(channels, value_dim)
    if largest > LARGEST[kernel]:
        bias_too = " and 2 for the bias" if bias else ""
        return f"kernel {kernel!r} takes head sizes up to {LARGEST[kernel]}, and there are {max(head_dim, value_dim)}{bias_too}"
    if kernel not in GPUS:
        return None
    found = _generation(device) if generation is None else generation
    if found not in GPUS[kernel]:
        return f"kernel {kernel!r} is for compute capability {GPUS[kernel][0]} to {GPUS[kernel][-1]}, and this is {found}"
    natural = (channels, value_dim) in ((256, 256), (192, 128))
    if kernel == "flash4" and found in (10, 11) and largest > LARGEST_ON_BLACKWELL and not natural:
        return f"kernel 'flash4' takes head sizes up to {LARGEST_ON_BLACKWELL} on this GPU, 192 with 128, or 256"
    return None


def pick(device: torch.device | str, dtype: torch.dtype, head_dim: int, *, bias: bool = False, softcap: bool = False) -> Pick:
    """The kernel for these tensors among those that run here, and why it is that one."""
    device = torch.device(device)
    for name, why in _RANKING:
        wanted = (
            softcap if name == "flex" else not (bias and softcap)
        )  # flash-attn leaves those two together to plain mathematics
        if device.type == "cuda" and wanted and obstacle(name, device, dtype, head_dim, bias=bias) is None:
            return Pick(name, why)
    return Pick("sdpa", f"torch's own fused operators; no other kernel that runs here on {device.type} is known to be faster")


_RANKING = (
    ("flash3", "flash-attn 3 is installed, and is made for this GPU"),
    ("flash4", "flash-attn 4 is installed, and is made for this GPU"),
    ("flash2", "flash-attn 2 is installed: bands as windows, many documents in one call"),
    ("flex", "of what is installed only flex fuses softcap"),
)


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
