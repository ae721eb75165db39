"""`python -m ringattn selftest`, alone or under torchrun; see the package."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ringattn.diagnostics.selftest.one_device import SCHEDULES, WORLDS, simulated
from ringattn.diagnostics.selftest.report import as_table


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if everything passed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ringattn selftest", description=__doc__)
    parser.add_argument("--kernel", nargs="+", default=[], help="only these; one that cannot run here counts as a failure")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where ranks are simulated; a GPU if there is one, by default"
    )
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of ranks to simulate")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    asked = parser.parse_args(arguments)
    # cuBLAS reads it when it starts; without it torch refuses matrix products in deterministic mode, which is one of the tests.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _under_torchrun(asked.kernel)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    outcomes = []
    for outcome in simulated(asked.kernel, device=device, worlds=asked.worlds, schedules=asked.schedules):
        outcomes.append(outcome)
        what = outcome.trap or f"{outcome.schedule} over {outcome.world}"
        print(f"{outcome.kernel} {outcome.dtype} {what}: {outcome}", file=sys.stderr, flush=True)
    print(as_table(outcomes, f"ringattn selftest: simulated ranks on {device}"))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _under_torchrun(kernels: list[str]) -> int:
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
    dist.barrier()  # torchrun stops all ranks when the first exits with 1, and rank 0 has to have its say
    dist.destroy_process_group()
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
