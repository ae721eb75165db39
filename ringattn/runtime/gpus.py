"""Decides, on all ranks together, which backend a job uses and which GPU each rank has. Before there is a process group.

Launchers differ: torchrun shows every rank all GPUs of its host, Slurm and Ray may show each rank only its own, as number 0. So
GPUs are told apart by their UUIDs, which ranks exchange through the rendezvous store. What is wrong is raised on every rank.
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
    """What one rank has been given and finds. gpu: number and UUID of the GPU it would take, None if it sees none."""

    backend: str | None
    host: str
    gpus: int
    gpu: tuple[int, str] | None
    nccl: bool
    shares: bool


def choose(store: Store, env: Mapping[str, int], backend: str | None, timeout: float) -> tuple[str, int | None]:
    """The backend of the job, "nccl" or "gloo", and with nccl the number of this rank's GPU. Every rank calls it.

    backend: what the caller asks for; None takes nccl where every rank has a GPU of its own, gloo where no rank has one.

    Raises:
        LaunchError: ranks ask for different backends, or GPUs are there but not one for each rank. Raised on every rank.
    """
    own = _look(env["LOCAL_RANK"], backend)
    store.set(f"gpu/{env['RANK']}", json.dumps(own))
    keys = [f"gpu/{rank}" for rank in range(env["WORLD_SIZE"])]
    store.wait(keys, timedelta(seconds=timeout))
    chosen = decide([VisibleGpus(*json.loads(one)) for one in store.multi_get(keys)])
    return chosen, own.gpu[0] if chosen == "nccl" and own.gpu else None


def decide(everyone: Sequence[VisibleGpus]) -> str:
    """The backend, from what all ranks see. Raises `LaunchError`; see `choose`."""
    asked = _by(everyone, "backend")
    if len(asked) > 1:
        said = ", ".join(f"{backend} on {format_ranks(ranks, len(everyone))}" for backend, ranks in asked.items())
        raise LaunchError(f"ranks disagree on backend: {said}; pass the same to init() on every rank")
    backend = everyone[0].backend
    if backend == "gloo" or (backend is None and not any(one.gpus for one in everyone)):
        return "gloo"
    without = [rank for rank, one in enumerate(everyone) if one.gpu is None]
    if without:
        _raise(everyone, f"{format_ranks(without, len(everyone))} {_verb(without, 'sees', 'see')} no GPU")
    if not all(one.nccl for one in everyone):
        raise LaunchError(f"there are GPUs, but torch was built without NCCL; install a build that has it, {ON_CPUS}")
    shared = {gpu: ranks for gpu, ranks in _by(everyone, "gpu_uuid").items() if len(ranks) > 1}
    if shared and not all(one.shares for one in everyone):
        gpu, ranks = next(iter(shared.items()))
        _raise(everyone, f"{format_ranks(ranks, len(everyone))} would share one GPU ({gpu})")
    return "nccl"


def nccl_options(high_priority_stream: bool | None, max_ctas: int | None) -> Any:
    """What `init_process_group` takes as `pg_options` for NCCL."""
    options: Any = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = high_priority_stream is not False
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    return options


def _look(local_rank: int, backend: str | None) -> VisibleGpus:
    """A rank that sees fewer GPUs than there are ranks on its host has been shown its own ones."""
    gpus = 0 if backend == "gloo" else torch.cuda.device_count()
    index = local_rank % gpus if gpus else None
    gpu = None if index is None else (index, str(torch.cuda.get_device_properties(index).uuid))
    shares = os.environ.get(SHARES) == "1"
    return VisibleGpus(backend, socket.gethostname(), gpus, gpu, dist.is_nccl_available(), shares)


def _by(everyone: Sequence[VisibleGpus], what: str) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = defaultdict(list)
    for rank, one in enumerate(everyone):
        found[one.gpu and one.gpu[1] if what == "gpu_uuid" else getattr(one, what)].append(rank)
    return found


def _raise(everyone: Sequence[VisibleGpus], problem: str) -> NoReturn:
    """With what each host has: how many ranks, and how many GPUs they see."""
    hosts = []
    for host, ranks in _by(everyone, "host").items():
        counts = sorted({everyone[rank].gpus for rank in ranks})
        found = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        hosts.append(f"on {host} {len(ranks)} {_verb(ranks, 'rank sees', 'ranks see')} {found}")
    raise LaunchError(
        f"not every rank has a GPU of its own: {problem}. GPUs: {'; '.join(hosts)}. Start as many ranks on a host as it has "
        f"GPUs (--nproc-per-node), let each see its own (CUDA_VISIBLE_DEVICES), {ON_CPUS}"
    )


def _verb(ranks: Sequence[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several
