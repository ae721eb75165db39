"""Joins the process group of a torchrun job: `init` fails early with clear errors, and supports restarts.

In addition to `torch.distributed.init_process_group` it reads the environment first and answers a gap with the command to use;
the store's keys carry the attempt number, without which a torchrun restart reads the addresses of dead workers and cannot
connect; every wait has a deadline; and near ranks exchange a message before the first attention depends on it.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store

import ringattn
from ringattn._validation import count, flag, one_of, path, seconds, short_repr
from ringattn.comm.consistency import format_ranks
from ringattn.comm.gloo_duplex import finish, prepare, receiving, sending
from ringattn.comm.process_group import LAUNCH_HINT, backends, device_type_of
from ringattn.comm.select import TRANSPORTS
from ringattn.comm.select import choose as choose_transport
from ringattn.errors import LaunchError
from ringattn.faults.event_log import begin
from ringattn.faults.watchdog import watch
from ringattn.runtime.gpus import choose, nccl_options
from ringattn.runtime.hosts import INTERFACE, address, unreachable_pairs_of

AXIS = "sequence"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
MOST_CTAS = 64  # NCCL's channels
MOST_RANKS = 1 << 20
REACH = 5.0  # seconds in which a host must answer
ERROR_WAIT = 5.0  # seconds for which a rank with an error waits for the others to detect it
# gloo's threads release the tensors of a collective shortly after it returns. If the interpreter has exited by then, the
# process aborts.
EXIT_DELAY = 0.05
WARM_PEERS = 32  # in each direction; connections cost memory, and no schedule needs all of thousands of ranks at once


def init(
    backend: str | None = None,
    *,
    timeout: float = 120.0,
    journal: str | Path | None = None,
    high_priority_stream: bool | None = None,
    max_ctas: int | None = None,
    transport: str | None = None,
) -> DeviceMesh:
    """Joins the process group of a torchrun job and returns it as a 1-D DeviceMesh with axis "sequence".

    An unhandled SIGTERM ends a rank as before; a rank that is waiting for others first reports which ranks are missing, which
    may take two seconds.

    Args:
        backend: "nccl" or "gloo"; by default nccl where every rank has a GPU of its own, gloo where no rank sees a GPU.
        timeout: seconds that any single communication may take before it is an error.
        journal: a directory for event logs, one for each rank: `rank00000.jsonl` and so on, see `faults`.
        high_priority_stream: whether NCCL's transfers have priority over compute that has not begun. None: yes, with nccl.
        max_ctas: thread blocks (CTAs), and so at most SMs, that NCCL may take from compute; 1 to 64. None: NCCL decides.
        transport: how tensors travel between ranks: "p2p" over the backend; "shared_memory" for those on CPUs, between ranks of
            one host; "symmetric_memory" for those on GPUs of one host, which has not run on GPUs yet. By default shared memory
            in each group whose ranks are all on one host, else p2p. The same on every rank.

    `high_priority_stream` and `max_ctas` are options of nccl. The number of SMs that attention leaves to transfers is an
    option of the plan's kernel: see `make_plan(kernel=)`.

    Raises:
        LaunchError: an argument or torchrun's environment is missing or wrong, a rank does not start, there are GPUs but not
            one for each rank, an option of nccl is given for gloo or an existing process group, or the requested transport is
            not possible.
        CommError: a rank died after all had started.
    """
    _check(backend, timeout, journal, high_priority_stream, max_ctas, transport)
    env = environment()
    options = {"high_priority_stream": high_priority_stream, "max_ctas": max_ctas}
    if dist.is_initialized():
        device = _device_of_existing(backend, env, options)
    else:
        atexit.register(time.sleep, EXIT_DELAY)
        device = _join(backend, env, timeout, options)
    mesh = DeviceMesh(device, list(range(env["WORLD_SIZE"])), mesh_dim_names=(AXIS,))
    if journal is not None:
        attempt = int(os.environ.get(ATTEMPT, "0"))
        where = {"host": socket.gethostname(), "pid": os.getpid(), "world": env["WORLD_SIZE"], "attempt": attempt}
        begin(
            journal, **where, backend=backends(mesh.get_group())[device], ringattn=ringattn.__version__, torch=torch.__version__
        )
    _warm_up(mesh)
    watch()
    choose_transport(mesh.get_group(), transport)
    return mesh


def _check(
    backend: object, timeout: object, journal: object, high_priority_stream: object, max_ctas: object, transport: object
) -> None:
    if backend is not None:
        one_of("backend", backend, ("gloo", "nccl"), LaunchError)
    seconds("timeout", timeout, LaunchError)
    if journal is not None:
        path("journal", journal, LaunchError)
    if high_priority_stream is not None:
        flag("high_priority_stream", high_priority_stream, LaunchError)
    if max_ctas is not None:
        count("max_ctas", max_ctas, LaunchError, most=MOST_CTAS)
    if transport is not None:
        one_of("transport", transport, TRANSPORTS, LaunchError)


def environment() -> dict[str, int]:
    """torchrun's integers, or `LaunchError` naming what is missing or wrong."""
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
        raise LaunchError(f"torchrun's environment is damaged ({short_repr(error)}); {LAUNCH_HINT}") from error
    count("WORLD_SIZE", env["WORLD_SIZE"], LaunchError, most=MOST_RANKS)
    count("MASTER_PORT", env["MASTER_PORT"], LaunchError, most=65535)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        count(name, env[name], LaunchError, least=int(name == "LOCAL_WORLD_SIZE"), most=MOST_RANKS)
    if not 0 <= env["RANK"] < env["WORLD_SIZE"]:
        raise LaunchError(f"RANK={short_repr(env['RANK'])} does not lie in WORLD_SIZE={env['WORLD_SIZE']}; {LAUNCH_HINT}")
    address()  # reports a wrong interface here, instead of by a timeout
    return env


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raises `LaunchError` for options of NCCL that would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise LaunchError(f"{name}={short_repr(value)} is an option of NCCL, {why}; leave it out")


def _device_of_existing(backend: str | None, env: Mapping[str, int], options: Mapping[str, object]) -> str:
    """The device type of an existing default group."""
    group = dist.group.WORLD
    assert group is not None
    _refuse(options, "given when a group is made, and the process group exists already")
    backend_of = backends(group)
    if backend is not None and backend not in backend_of.values():
        backend_list = ", ".join(f"{device}:{name}" for device, name in backend_of.items())
        raise LaunchError(f"backend={backend!r}, and the existing process group has {backend_list}; leave backend out")
    device = device_type_of(group) if backend is None else next(kind for kind, name in backend_of.items() if name == backend)
    if device == "cuda" and group.bound_device_id is None and env["LOCAL_RANK"] < torch.cuda.device_count():
        torch.cuda.set_device(env["LOCAL_RANK"])
    return device


def connect(env: Mapping[str, int], timeout: float) -> Store:
    """torchrun's store, with keys of this attempt only. Raises `LaunchError` when it does not answer."""
    # Under torchrun the agent hosts the store; without it rank 0 must.
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], env["MASTER_PORT"]
    shown_host = host if len(host) < 200 else short_repr(host)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            env["WORLD_SIZE"],
            is_master=not hosted_by_agent and env["RANK"] == 0,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:  # DistError derives from RuntimeError
        hint = (
            "the port is taken: choose another with --master-port, or let torchrun choose with --standalone"
            if "EADDRINUSE" in str(error)
            else "is rank 0 running, and is this address right and reachable from here?"
        )
        raise LaunchError(
            f"rank {env['RANK']} of {env['WORLD_SIZE']} could not use the store at {shown_host}:{port} (MASTER_ADDR, "
            "MASTER_PORT) "
            f"within {timeout:.0f} s: {hint} The backend says: {_first_line(error)}"
        ) from error
    attempt = os.environ.get(ATTEMPT, "0")
    return PrefixStore(f"attempt_{attempt}", store)


def wait_for_ranks(store: Store, env: Mapping[str, int], timeout: float) -> None:
    """Waits until every rank has started. Raises `LaunchError` naming those that have not within `timeout` seconds."""
    store.set(f"here/{env['RANK']}", socket.gethostname())
    keys = [f"here/{rank}" for rank in range(env["WORLD_SIZE"])]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            raise LaunchError(
                f"rank {env['RANK']} of {env['WORLD_SIZE']} lost the store while it waited for the others; check what ended "
                "the "
                "process that hosts it (torchrun's agent, or rank 0)"
            ) from error
        raise LaunchError(
            f"{format_ranks(missing, env['WORLD_SIZE'])} of {env['WORLD_SIZE']} did not start within {timeout:.0f} s, reports "
            "rank "
            f"{env['RANK']}; see the log of what should have started there, and that WORLD_SIZE (--nnodes x --nproc-per-node) "
            "is the number of ranks that are started"
        ) from error


def _join(backend: str | None, env: Mapping[str, int], timeout: float, options: Mapping[str, Any]) -> str:
    """Makes the default group; returns its device type."""
    store = connect(env, timeout)
    wait_for_ranks(PrefixStore("ringattn/init", store), env, timeout)
    unreachable_pairs, limit, more = "", timedelta(seconds=timeout), {}
    try:
        backend, gpu = choose(PrefixStore("ringattn/gpus", store), env, backend, timeout)
        if backend == "nccl":
            torch.cuda.set_device(gpu)
            more = {"pg_options": nccl_options(**options)}
        else:
            _refuse(options, "and this job uses gloo")
        if backend == "gloo":  # gloo itself would retry for 30 s, whatever the timeout, and name no rank
            unreachable_pairs = unreachable_pairs_of(
                PrefixStore("ringattn/reach", store), env["RANK"], env["WORLD_SIZE"], min(timeout, REACH)
            )
        if not unreachable_pairs:
            dist.init_process_group(backend, store=store, rank=env["RANK"], world_size=env["WORLD_SIZE"], timeout=limit, **more)
    except LaunchError:
        _wait_before_raising(PrefixStore("ringattn/left", store), env, min(timeout, ERROR_WAIT))
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {env['RANK']} of {env['WORLD_SIZE']}, at {address()}: all ranks have started but could not connect to each "
            f"other within {timeout:.0f} s; `ringattn doctor` under the same torchrun names the pairs that cannot connect, and "
            f"{INTERFACE} which interface is used. The backend says: {_first_line(error)}"
        ) from error
    if unreachable_pairs:
        raise LaunchError(
            f"{unreachable_pairs}; set {INTERFACE} to the interface that joins the hosts (`ip address`), and open its ports"
        )
    return "cuda" if backend == "nccl" else "cpu"


def _wait_before_raising(store: Store, env: Mapping[str, int], timeout: float) -> None:
    """Waits until every rank is about to raise. Rank 0 may host the store: if it exited at once, the others would lose the
    store while they read the error, and would raise that instead."""
    with suppress(RuntimeError):  # a rank that is missing has its own error; this rank keeps its own
        store.set(str(env["RANK"]), "")
        store.wait([str(rank) for rank in range(env["WORLD_SIZE"])], timedelta(seconds=timeout))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _warm_up(mesh: DeviceMesh) -> None:
    """Exchanges one byte with each near rank, in one batch, so that connections exist before attention needs them."""
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
