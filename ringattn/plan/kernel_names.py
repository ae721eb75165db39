"""Parses names of kernels and their options, as make_plan(kernel=...) accepts them and plans store them.

An option follows a colon: "flash3:sm_margin=8". It is part of the name, so it is part of the plan's digest and the same
on every rank. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ringattn._validation import short_repr
from ringattn.errors import RingAttnError

KERNELS = ("sdpa", "reference", "cudnn", "flash", "efficient", "flex", "flash2", "flash3", "flash4")
EMULATED = "emulated"  # after its colon follow the flop/s, see `kernels.emulated`
MOST_SMS = 1024  # streaming multiprocessors; no GPU has as many
# By kernel: the options its name may carry, with what each means.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "flash3": {"sm_margin": f"multiprocessors to leave to others, as NCCL; 0 to {MOST_SMS}"},
}


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
    known = OPTIONS.get(kernel)
    if known is None:
        having = ", ".join(OPTIONS)
        raise error(f"kernel={short_repr(name)}; {kernel!r} has no options (only {having} has): pass kernel={kernel!r}")
    pairs = [_option(kernel, known, part, name, error) for part in text.split(",")]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise error(f"kernel={short_repr(name)}; an option occurs twice: pass each once")
    return KernelName(kernel, options)


def _option(kernel: str, known: Mapping[str, str], part: str, name: str, error: type[RingAttnError]) -> tuple[str, int]:
    option, _, value = part.partition("=")
    meaning = "; ".join(f"{known_option}=N ({description})" for known_option, description in known.items())
    if option not in known:
        raise error(f"kernel={short_repr(name)}; options of {kernel!r} are {meaning}, not {short_repr(option)}")
    if not (value.isascii() and value.isdigit() and int(value[:6]) <= MOST_SMS and len(value) <= 6):
        raise error(f"kernel={short_repr(name)}; give {option} as a whole number: {meaning}")
    return option, int(value)
