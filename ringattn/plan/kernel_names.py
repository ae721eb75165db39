"""Parses names of kernels and their options, as make_plan(kernel=...) accepts them and plans store them.

An option follows a colon: "flash3:sm_margin=8". It is part of the name, so it is part of the plan's digest and the same
on every rank. `KERNELS` is the one list of names; `ringattn.kernels.register` adds to it. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ringattn._validation import Registry, short_repr
from ringattn.errors import RingAttnError

EMULATED = "emulated"  # after its colon follow the flop/s, see `kernels.emulated`
AUTO = "sdpa"  # the kernel that "auto" means
MOST_SMS = 1024  # streaming multiprocessors; no GPU has as many


class KernelOption(NamedTuple):
    """A whole number that a kernel's name may carry; 0 where it is left out."""

    meaning: str
    most: int


class KernelInfo(NamedTuple):
    """What is known of a kernel without importing it."""

    summary: str
    options: Mapping[str, KernelOption] = MappingProxyType({})


_SM_MARGIN = KernelOption(f"multiprocessors to leave to others, as NCCL; 0 to {MOST_SMS}", MOST_SMS)

KERNELS: Registry[KernelInfo] = Registry(
    "kernel",
    {
        "sdpa": KernelInfo("torch's own fused operators, chosen as torch would"),
        "reference": KernelInfo("plain mathematics"),
        "cudnn": KernelInfo("torch's cuDNN operator, wherever it can be had on CUDA"),
        "flash": KernelInfo("torch's flash-attention operator, wherever it can be had on CUDA"),
        "efficient": KernelInfo("torch's memory-efficient operator, wherever it can be had on CUDA"),
        "flex": KernelInfo("torch's flex_attention"),
        "flash2": KernelInfo("the flash-attn 2 package, which must be installed"),
        "flash3": KernelInfo("the flash-attn 3 package, which must be installed", {"sm_margin": _SM_MARGIN}),
        "flash4": KernelInfo("the flash-attn 4 package, which must be installed"),
    },
    reserved=("auto", EMULATED),
)


class KernelName(NamedTuple):
    """A kernel and its options."""

    kernel: str
    options: Mapping[str, int]

    def __str__(self) -> str:
        options = ",".join(f"{option}={value}" for option, value in sorted(self.options.items()) if value)
        return f"{self.kernel}:{options}" if options else self.kernel


def parse(name: str, error: type[RingAttnError]) -> KernelName:
    """Parses a name. `str()` of the result omits options with their default, 0, so that equal plans have equal names.

    Raises:
        error: no such kernel, an option that it does not have, or an invalid value.
    """
    kernel, colon, text = name.partition(":")
    if kernel not in KERNELS:
        raise error(f"kernel={short_repr(name)}; choose one of auto, {', '.join(KERNELS)}, {EMULATED}:FLOPS")
    if not colon:
        return KernelName(kernel, {})
    known = KERNELS[kernel].options
    if not known:
        having = [name for name, info in KERNELS.items() if info.options]
        only = f"only {', '.join(having)} {'has' if len(having) == 1 else 'have'}"
        raise error(f"kernel={short_repr(name)}; {kernel!r} has no options ({only}): pass kernel={kernel!r}")
    pairs = [_option(kernel, known, part, name, error) for part in text.split(",")]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise error(f"kernel={short_repr(name)}; an option occurs twice: pass each once")
    return KernelName(kernel, options)


def _option(
    kernel: str, known: Mapping[str, KernelOption], part: str, name: str, error: type[RingAttnError]
) -> tuple[str, int]:
    option, _, value = part.partition("=")
    meaning = "; ".join(f"{known_option}=N ({about.meaning})" for known_option, about in known.items())
    if option not in known:
        raise error(f"kernel={short_repr(name)}; options of {kernel!r} are {meaning}, not {short_repr(option)}")
    if not (value.isascii() and value.isdigit() and len(value) <= 18 and int(value) <= known[option].most):
        raise error(f"kernel={short_repr(name)}; give {option} as a whole number: {meaning}")
    return option, int(value)
