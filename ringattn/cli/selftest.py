"""`ringattn selftest`: compares every kernel that runs here with dense attention in fp64."""

from __future__ import annotations

import sys
from typing import Literal

from ringattn.cli.requirements import require


def selftest(
    *,
    kernel: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] | None = None,
    worlds: tuple[int, ...] | None = None,
    schedules: tuple[str, ...] | None = None,
) -> None:
    """Compare every kernel that runs here with dense attention in fp64, through every schedule (exit status 1 if one is wrong).

    Ranks are simulated in this process; under torchrun (`torchrun ... -m ringattn selftest`) they are real.

    Args:
        kernel: Only these; one that cannot run here counts as a failure.
        device: Where ranks are simulated; by default a GPU if there is one.
        worlds: Numbers of ranks to simulate; by default 2, 4 and 8.
        schedules: Simulate only these, by name; by default all.
    """
    require("torch")
    from ringattn.diagnostics.selftest import run

    sys.exit(0 if run(kernel, device=device, worlds=worlds, schedules=schedules) else 1)
