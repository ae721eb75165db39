"""`init`: from torchrun's environment to a process group that fails early, clearly, and restarts.

What it adds to `torch.distributed.init_process_group`: the environment is read first and a gap is answered with the command to
use; the store's keys carry the attempt number, without which a torchrun restart reads the addresses of dead workers and cannot
connect; every wait has a deadline; and near ranks have exchanged a message before the first attention relies on it.
"""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

from ringattn.comm.duplex import finish, prepare, receiving, sending
from ringattn.comm.group import LAUNCH_HINT
from ringattn.errors import LaunchError

AXIS = "sequence"
# gloo's threads let go of a collective's tensors a moment after it has returned. If the interpreter is gone by then, the
# process aborts instead of exiting.
LAST_BREATH = 0.05
WARM_PEERS = 32  # in each direction; connections cost memory, and no schedule needs all of thousands of ranks at once


def init(backend: str | None = None, *, timeout: float = 120.0) -> DeviceMesh:
    """Join the process group that torchrun started and return it as a 1-D DeviceMesh with axis "sequence".

    Args:
        backend: "nccl" or "gloo"; by default nccl where every local rank has a GPU of its own, else gloo.
        timeout: seconds that any single communication may take before it is an error.

    Raises:
        LaunchError: torchrun's environment is missing or wrong, a rank does not come, or there are too few GPUs.
    """
    env = _environment()
    if backend is None:
        backend = "nccl" if torch.cuda.device_count() >= env["LOCAL_WORLD_SIZE"] else "gloo"
    if backend == "nccl":
        _take_gpu(env["LOCAL_RANK"])
    if not dist.is_initialized():
        atexit.register(time.sleep, LAST_BREATH)
        _join(backend, env, timedelta(seconds=timeout))
    device = "cuda" if backend == "nccl" else "cpu"
    mesh = DeviceMesh(device, list(range(env["WORLD_SIZE"])), mesh_dim_names=(AXIS,))
    _warm_up(mesh)
    return mesh


def _environment() -> dict[str, int]:
    """torchrun's integers, or `LaunchError` naming what is missing."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    missing = [name for name in (*names, "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} not set in the environment: this process was not started by torchrun; {LAUNCH_HINT}"
        )
    try:
        env = {name: int(os.environ[name]) for name in names}
        env["LOCAL_WORLD_SIZE"] = int(os.environ.get("LOCAL_WORLD_SIZE", env["LOCAL_RANK"] + 1))
    except ValueError as error:
        raise LaunchError(f"torchrun's environment is damaged ({error}); {LAUNCH_HINT}") from error
    if not 0 <= env["RANK"] < env["WORLD_SIZE"]:
        raise LaunchError(f"RANK={env['RANK']} does not lie in WORLD_SIZE={env['WORLD_SIZE']}; {LAUNCH_HINT}")
    return env


def _take_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU of its own: this host has {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or use init(backend='gloo')"
        )
    torch.cuda.set_device(local_rank)


def _join(backend: str, env: dict[str, int], timeout: timedelta) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Under torchrun the agent hosts the store; without it rank 0 must.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = f"{os.environ['MASTER_ADDR']}:{env['MASTER_PORT']}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            env["MASTER_PORT"],
            env["WORLD_SIZE"],
            is_master=not hosted and env["RANK"] == 0,
            timeout=timeout,
            wait_for_workers=False,
        )
        prefixed = PrefixStore(f"attempt_{attempt}", store)
        dist.init_process_group(backend, store=prefixed, rank=env["RANK"], world_size=env["WORLD_SIZE"], timeout=timeout)
    except (RuntimeError, ValueError) as error:  # DistError derives from RuntimeError
        raise LaunchError(
            f"rank {env['RANK']} of {env['WORLD_SIZE']} could not join the group at {address} "
            f"within {timeout.total_seconds():.0f} s: "
            f"is every rank running, and is {address} reachable and free? The backend says: {error}"
        ) from error


def _warm_up(mesh: DeviceMesh) -> None:
    """One byte to and from each near rank, in one batch: connections exist before anything depends on them."""
    group, rank, world = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    if world == 1:
        return
    prepare(group)
    byte = torch.zeros(1, dtype=torch.uint8, device=mesh.device_type)
    ops = []
    for offset in range(1, min(world, WARM_PEERS + 1)):
        ops.append(sending(byte, group, rank, (rank + offset) % world))
        ops.append(receiving(byte.clone(), group, rank, (rank - offset) % world))
    finish(ops)
