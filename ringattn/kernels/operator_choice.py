"""Chooses which of torch's fused attention operators computes a call, as torch's own attention would.

The rules are those of torch's dispatch (`select_sdp_backend`, `check_prefer_cudnn_attention` and the `can_use_...` functions in
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): cuDNN's first on compute capability 9 and 10 with cuDNN 9.15.1 or later,
then flash-attention's, then the memory-efficient one; never cuDNN's where deterministic algorithms are required, or where
`torch.backends.cuda.enable_cudnn_sdp(False)` has turned it off. Two rules are narrower than torch's:

- Head sizes above 128 do not go to cuDNN, although some releases of torch take it up to 256: they disagree about backward.
- torch before 2.9 counts as preferring cuDNN nowhere.

`operator` is a pure function of a call's shape and of facts about the device, so every rank with the same GPU, torch and
settings chooses the same. `device_facts` reads these facts.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
LARGEST_CUDNN = 128  # head sizes
LARGEST_FLASH = 256
MOST_CUDNN = 65535  # of batch and heads each
CUDNN_9_15_1 = 91501  # the first with right results where the number of keys is no multiple of 128 (torch issue 169849)
AMPERE, HOPPER, BLACKWELL = 8, 9, 10  # major compute capabilities


class CallShape(NamedTuple):
    """The properties of a call that decide. `width`: head size, including the channels of a bias, v if larger, and padding."""

    dtype: torch.dtype
    width: int
    keys: int
    masked: bool = False  # whether it needs an explicit mask, as a band does
    many: int = 1  # the larger of batch and heads


class Facts(NamedTuple):
    """The properties of a device and of torch's settings that decide."""

    capability: tuple[int, int] = (8, 0)  # major, minor
    cudnn: int = 0  # as torch.backends.cudnn.version() gives it, 91501 for 9.15.1; 0 where there is none
    torch: tuple[int, int] = (2, 6)
    cuda: tuple[int, int] = (12, 4)  # that torch was built for
    cudnn_enabled: bool = True
    flash_enabled: bool = True
    deterministic: bool = False


def operator(kernel: str, shape: CallShape, facts: Facts) -> str:
    """ "cudnn", "flash", "efficient" or "reference" on a CUDA device. `kernel`: "sdpa" as torch chooses, or the preferred one.

    Calls that the preferred operator does not support (flash-attention's takes no band, two of them take no fp32) go to the
    next one that does, as under torch's own dispatch.
    """
    if kernel == "cudnn" and cudnn_takes(shape, facts):
        return "cudnn"
    if kernel == "sdpa" and cudnn_preferred(facts) and cudnn_takes(shape, facts):
        return "cudnn"
    if kernel != "efficient" and flash_takes(shape, facts) and (facts.flash_enabled or kernel == "flash"):
        return "flash"
    return "efficient" if efficient_takes(shape, facts) else "reference"


def cudnn_preferred(facts: Facts) -> bool:
    """Whether torch itself puts cuDNN before flash-attention on this device."""
    if not facts.cudnn_enabled or facts.deterministic or facts.torch < (2, 9) or facts.cudnn < CUDNN_9_15_1:
        return False
    major, minor = facts.capability
    # Builds for CUDA 12 prefer it on 9.0, 10.0 and 10.3 only.
    return major in (HOPPER, BLACKWELL) and (facts.cuda >= (13, 0) or minor in (0, 3))


def cudnn_takes(shape: CallShape, facts: Facts) -> bool:
    fits = shape.width <= LARGEST_CUDNN and shape.keys > 1 and shape.many <= MOST_CUDNN
    return fits and shape.dtype in HALF and facts.cudnn >= 90000 and facts.capability >= (AMPERE, 0)


def flash_takes(shape: CallShape, facts: Facts) -> bool:
    fits = shape.width <= LARGEST_FLASH and not shape.masked and shape.dtype in HALF
    # Its backward does not fit these sizes into the shared memory of 8.6 to 8.9 and 12.
    tight = (8, 6) <= facts.capability <= (8, 9) or facts.capability[0] == 12
    return fits and facts.capability >= (AMPERE, 0) and not (tight and 192 < shape.width <= 224)


def efficient_takes(shape: CallShape, facts: Facts) -> bool:
    if shape.dtype == torch.bfloat16:
        return facts.capability >= (AMPERE, 0)
    return shape.dtype in (torch.float16, torch.float32)


def call_width(head_dim: int, value_dim: int, *, bias: bool) -> int:
    """The head size that torch's CUDA operators are called with: a bias takes two channels, and sizes are multiples of 8."""
    width = max(head_dim + 2 * bias, value_dim)
    return width + -width % 8


def chosen(kernel: str, device: torch.device, shape: CallShape) -> str:
    """`operator` for a device as it is now; "cpu" on the CPU, "reference" on devices without such operators in torch."""
    if device.type == "cpu":
        return "cpu"
    return _cached_operator(kernel, shape, _gpu_facts(device), _settings()) if device.type == "cuda" else "reference"


@lru_cache(maxsize=4096)
def _cached_operator(kernel: str, shape: CallShape, gpu: Facts, settings: tuple[bool, bool, bool]) -> str:
    return operator(kernel, shape, _with_settings(gpu, settings))


def device_facts(device: torch.device) -> Facts:
    """The facts of this device and of torch's present settings."""
    return _with_settings(_gpu_facts(device), _settings())


def _with_settings(gpu: Facts, settings: tuple[bool, bool, bool]) -> Facts:
    cudnn, flash, deterministic = settings
    return gpu._replace(cudnn_enabled=cudnn, flash_enabled=flash, deterministic=deterministic)


def _settings() -> tuple[bool, bool, bool]:
    """Read at every call, since a program may change them."""
    return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(), strictly_deterministic()


def _gpu_facts(device: torch.device) -> Facts:
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return _read_gpu_facts(device)


def strictly_deterministic() -> bool:
    """Whether nondeterministic operators must raise, and not only warn."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@cache
def _read_gpu_facts(device: torch.device) -> Facts:
    if not torch.cuda.is_available():  # tensors are fake
        return Facts(torch=version(torch.__version__))
    cudnn = 0 if torch.version.hip else torch.backends.cudnn.version() or 0
    return Facts(
        torch.cuda.get_device_capability(device), cudnn, version(torch.__version__), version(torch.version.cuda or "0")
    )


def version(text: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor, *_ = (*map(int, re.findall(r"\d+", text)[:2]), 0, 0)
    return major, minor
