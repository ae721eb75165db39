"""Runs the self-test and prints its table: on simulated ranks in this process, or under torchrun on real ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from ringattn._validation import count, one_of
from ringattn.diagnostics.selftest.one_device import SCHEDULES, WORLDS, simulated
from ringattn.diagnostics.selftest.report import as_table
from ringattn.errors import InputError
from ringattn.plan.kernel_names import parse

MOST_RANKS = 1024  # simulated in one process


def run(
    kernels: Sequence[str] = (),
    *,
    device: str | None = None,
    worlds: Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
) -> bool:
    """Whether everything passed; progress goes to stderr, the table to stdout. Under torchrun collective over all its ranks.

    Args:
        kernels: only these; one that cannot run here counts as a failure. By default every kernel that runs here.
        device: where ranks are simulated, "cpu" or "cuda"; by default a GPU if there is one.
        worlds: numbers of ranks to simulate.
        schedules: simulate only these.

    Raises:
        InputError: an argument is out of range, or says how to simulate ranks under torchrun, whose ranks are real.
    """
    # cuBLAS reads it when it starts; without it torch refuses matrix products in deterministic mode, which is one of the tests.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for kernel in kernels:
        parse(kernel, InputError)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        arguments = {"device": device, "worlds": worlds, "schedules": schedules}
        for name, value in arguments.items():
            if value is not None:
                raise InputError(f"{name}={value}: under torchrun ranks are real and all schedules run; leave it out")
        return _over_ranks(kernels)
    worlds = [count("worlds", world, InputError, most=MOST_RANKS) for world in (WORLDS if worlds is None else worlds)]
    schedules = [one_of("schedules", name, SCHEDULES, InputError) for name in (SCHEDULES if schedules is None else schedules)]
    return _simulated(kernels, device, worlds, schedules)


def _simulated(kernels: Sequence[str], device: str | None, worlds: Sequence[int], schedules: Sequence[str]) -> bool:
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if torch_device.type == "cuda":
        torch_device = torch.device("cuda", torch.cuda.current_device())
    outcomes = []
    for outcome in simulated(kernels, device=torch_device, worlds=worlds, schedules=schedules):
        outcomes.append(outcome)
        what = outcome.trap or f"{outcome.schedule} over {outcome.world}"
        print(f"{outcome.kernel} {outcome.dtype} {what}: {outcome}", file=sys.stderr, flush=True)
    print(as_table(outcomes, f"ringattn selftest: simulated ranks on {torch_device}"))
    return all(outcome.passed for outcome in outcomes)


def _over_ranks(kernels: Sequence[str]) -> bool:
    import torch.distributed as dist

    from ringattn.comm.process_group import describe_backends
    from ringattn.diagnostics.selftest.ranks import over_ranks
    from ringattn.runtime import init

    mesh = init()
    # LOCAL_RANK's GPU has been made the current one.
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    outcomes = over_ranks(kernels, device)
    if dist.get_rank() == 0:
        print(
            as_table(outcomes, f"ringattn selftest: {mesh.size()} ranks, {describe_backends(mesh.get_group())}, {device.type}"),
            flush=True,
        )
    dist.barrier()  # torchrun stops all ranks when the first exits with 1, and rank 0 has to print before
    dist.destroy_process_group()
    return all(outcome.passed for outcome in outcomes)
