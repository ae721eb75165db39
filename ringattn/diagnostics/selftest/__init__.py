"""Compares every kernel that runs here with dense attention in fp64, forward and backward, through schedules and merges.

    ringattn selftest                                                  on one device, ranks simulated in one process
    torchrun --standalone --nproc-per-node N -m ringattn selftest      over gloo, or NCCL where there are GPUs

`run` does the same from Python and needs torch alone. On one device every schedule is carried out for 2, 4 and 8 simulated
ranks, with the tiles, merges and packing that real ranks have; what only a link can get wrong is tested under torchrun. Then
come traps: shapes and biases that have broken kernels before.

`cases` and `traps` define the inputs, `simulated_error` and `equal_bits` test one kernel and schedule, `simulated` runs
everything and yields plain data, for scripts.
"""

from ringattn.diagnostics.selftest.case import Case, cases, traps
from ringattn.diagnostics.selftest.one_device import (
    SCHEDULES,
    WORLDS,
    Outcome,
    equal_bits,
    kernels_here,
    simulated,
    simulated_error,
)
from ringattn.diagnostics.selftest.run import run

__all__ = [
    "SCHEDULES",
    "WORLDS",
    "Case",
    "Outcome",
    "cases",
    "equal_bits",
    "kernels_here",
    "run",
    "simulated",
    "simulated_error",
    "traps",
]
