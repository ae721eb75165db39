"""Chooses, on all ranks together and before there is a process group, the backend of a job and the GPU of each rank.

Launchers differ: torchrun shows every rank all GPUs of its host, Slurm and Ray may show each rank only its own, as number 0. So
GPUs are identified by UUID, which ranks exchange through the rendezvous store. Errors are raised on every rank.
"""

from __future__ import annotations

import json
import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ringattn.comm.consistency import format_ranks
from ringattn.errors import LaunchError

ON_CPUS = "or use init(backend='gloo') to run on CPUs"
SHARES = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own variable: 1 lets several ranks use one GPU, from 2.30 on


class VisibleGpus(NamedTuple):
    """What one rank reports. gpu: number and UUID of the GPU it would use, None if it sees none."""

    backend: str | None
    host: str
    gpus: int
    gpu: tuple[int, str] | None
    nccl: bool
    shares: bool


def choose(store: Store, env: Mapping[str, int], backend: str | None, timeout: float) -> tuple[str, int | None]:
    """The backend of the job, "nccl" or "gloo", and with nccl the number of this rank's GPU. Every rank calls it.

    backend: the requested one; None chooses nccl where every rank has its own GPU, gloo where no rank has one.

    Raises:
        LaunchError: ranks request different backends, or there are GPUs but not one for each rank. Raised on every rank.
    """
    own = _inspect(env["LOCAL_RANK"], backend)
    store.set(f"gpu/{env['RANK']}", json.dumps(own))
    keys = [f"gpu/{rank}" for rank in range(env["WORLD_SIZE"])]
    store.wait(keys, timedelta(seconds=timeout))
    chosen = decide([VisibleGpus(*json.loads(report)) for report in store.multi_get(keys)])
    return chosen, own.gpu[0] if chosen == "nccl" and own.gpu else None


def decide(reports: Sequence[VisibleGpus]) -> str:
    """Decides the backend from the reports of all ranks. Raises `LaunchError`; see `choose`."""
    by_backend = _by(reports, "backend")
    if len(by_backend) > 1:
        values = ", ".join(f"{backend} on {format_ranks(ranks, len(reports))}" for backend, ranks in by_backend.items())
        raise LaunchError(f"ranks disagree on backend: {values}; pass the same to init() on every rank")
    backend = reports[0].backend
    if backend == "gloo" or (backend is None and not any(report.gpus for report in reports)):
        return "gloo"
    without = [rank for rank, report in enumerate(reports) if report.gpu is None]
    if without:
        _raise(reports, f"{format_ranks(without, len(reports))} {_verb(without, 'sees', 'see')} no GPU")
    if not all(report.nccl for report in reports):
        raise LaunchError(f"there are GPUs, but torch was built without NCCL; install a build that has it, {ON_CPUS}")
    shared = {gpu: ranks for gpu, ranks in _by(reports, "gpu_uuid").items() if len(ranks) > 1}
    if shared and not all(report.shares for report in reports):
        gpu, ranks = next(iter(shared.items()))
        _raise(reports, f"{format_ranks(ranks, len(reports))} would share one GPU ({gpu})")
    return "nccl"


def nccl_options(high_priority_stream: bool | None, max_ctas: int | None) -> Any:
    """The `pg_options` of `init_process_group` for NCCL."""
    options: Any = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = high_priority_stream is not False
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    return options


def _inspect(local_rank: int, backend: str | None) -> VisibleGpus:
    """Reports this rank's GPUs. A rank that sees fewer GPUs than its host has ranks uses them modulo their number."""
    gpus = 0 if backend == "gloo" else torch.cuda.device_count()
    index = local_rank % gpus if gpus else None
    gpu = None if index is None else (index, str(torch.cuda.get_device_properties(index).uuid))
    shares = os.environ.get(SHARES) == "1"
    return VisibleGpus(backend, socket.gethostname(), gpus, gpu, dist.is_nccl_available(), shares)


def _by(reports: Sequence[VisibleGpus], field: str) -> dict[Any, list[int]]:
    by_value: dict[Any, list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        by_value[report.gpu and report.gpu[1] if field == "gpu_uuid" else getattr(report, field)].append(rank)
    return by_value


def _raise(reports: Sequence[VisibleGpus], problem: str) -> NoReturn:
    """Raises `LaunchError` with the numbers of ranks and visible GPUs of each host."""
    hosts = []
    for host, ranks in _by(reports, "host").items():
        counts = sorted({reports[rank].gpus for rank in ranks})
        by_value = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        hosts.append(f"on {host} {len(ranks)} {_verb(ranks, 'rank sees', 'ranks see')} {by_value}")
    raise LaunchError(
        f"not every rank has a GPU of its own: {problem}. GPUs: {'; '.join(hosts)}. Start as many ranks on a host as it has "
        f"GPUs (--nproc-per-node), let each see its own (CUDA_VISIBLE_DEVICES), {ON_CPUS}"
    )


def _verb(ranks: Sequence[int], singular: str, plural: str) -> str:
    return singular if len(ranks) == 1 else plural
