"""What only all ranks together can tell: can they reach each other, do they run the same code, how fast are their links.

    torchrun --nproc-per-node 8 -m ringattn doctor

Everything that a job relies on is tried before the job does: connections one by one and by name, versions and the digests of
the source and of a plan, a message round the ring in both directions, its bytes compared. Findings are the same on every rank.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

import ringattn
from ringattn.comm.consistency import format_ranks
from ringattn.comm.gloo_duplex import finish, prepare, receiving, sending
from ringattn.diagnostics.doctor import Finding, examine
from ringattn.planner import make_plan
from ringattn.runtime.hosts import unreachable
from ringattn.runtime.init import WARM_PEERS, connect, environment, init, roll_call

NBYTES = 8 << 20
REPEATS = 3
APART = 1.0  # seconds between clocks beyond which logs of two hosts can't be laid side by side


def examine_together(timeout: float = 60.0) -> Iterator[Finding]:
    """All findings, on every rank; collective over torchrun's ranks. Leaves no process group behind.

    Raises:
        LaunchError: torchrun's environment is wrong or a rank does not come; says which.
    """
    env = environment()
    rank, world = env["RANK"], env["WORLD_SIZE"]
    store = PrefixStore("ringattn/doctor", connect(env, timeout))
    roll_call(store, env, timeout)
    near = [(rank + n) % world for n in range(1, min(world, WARM_PEERS + 1))]
    store.set(f"cut off/{rank}", "; ".join(f"{peer} at {why}" for peer, why in unreachable(store, rank, near, 5.0).items()))
    cut_off = {n: said for n in range(world) if (said := store.get(f"cut off/{n}").decode())}
    if cut_off:
        said = "; ".join(f"rank {n} cannot connect to rank {peers}" for n, peers in cut_off.items())
        hint = "set GLOO_SOCKET_IFNAME to the interface that joins the hosts (see `ip address`), and open its ports"
        yield Finding("reachable peers", said, hint)
        return
    mesh = init(timeout=timeout)
    try:
        yield from _compared(_gather(facts(env)))
        yield Finding("reachable peers", f"every rank connects to {'every other' if world <= WARM_PEERS else 'its neighbours'}")
        yield _clocks()
        if world > 1:
            yield _links(mesh)
        yield from _hosts(list(examine()) if env["LOCAL_RANK"] == 0 else [])
    finally:
        dist.destroy_process_group()


def facts(env: Mapping[str, int]) -> dict[str, str]:
    """What must be the same on all ranks, and first where this one is."""
    plan = make_plan(1000 * env["WORLD_SIZE"] + 7, world=min(env["WORLD_SIZE"], 8), heads=6, kv_heads=2, head_dim=64)
    return {
        "ranks": socket.gethostname(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ringattn": ringattn.__version__,
        "source of ringattn": source_digest(),
        "a plan's digest": plan.digest,
    }


def source_digest() -> str:
    """Of every Python file of the package, names included."""
    root = Path(ringattn.__file__).parent
    found = sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _compared(everyone: list[dict[str, str]]) -> Iterator[Finding]:
    for what in everyone[0]:
        by_value: dict[str, list[int]] = {}
        for rank, said in enumerate(everyone):
            by_value.setdefault(said[what], []).append(rank)
        told = "; ".join(f"{value} on {format_ranks(ranks, len(everyone))}" for value, ranks in by_value.items())
        if what == "ranks":
            yield Finding(what, f"{len(everyone)}: {told}")
        else:
            hint = (
                "install the same on every host: ranks that differ disagree on plans, or on results"
                if len(by_value) > 1
                else ""
            )
            yield Finding(what, told, hint)


def _clocks() -> Finding:
    """The least spread of many readings, each as soon as a barrier lets this rank go."""
    spreads = []
    for _ in range(10):
        dist.barrier()
        spreads.append((max(read := _gather(time.time())) - min(read), read.index(max(read)), read.index(min(read))))
    spread, ahead, behind = min(spreads)
    hint = (
        f"synchronise clocks (chrony, ntp): times in the logs of ranks {ahead} and {behind} do not compare"
        if spread > APART
        else ""
    )
    return Finding("clocks", f"within {spread:.2g} s of each other", hint)


def _links(mesh: DeviceMesh) -> Finding:
    """Every rank to the next while every rank does, then the other way round. Bytes carry their sender's number."""
    group, rank, world = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    prepare(group)
    best: dict[int, float] = {}
    wrong = 0
    for offset in (1, -1):
        out = torch.full((NBYTES,), rank % 251, dtype=torch.uint8, device=mesh.device_type)
        come = torch.empty_like(out)
        to, source = (rank + offset) % world, (rank - offset) % world
        for _ in range(REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            finish([sending(out, group, rank, to), receiving(come, group, rank, source)])
            wrong += int((come != source % 251).sum())  # waits for a GPU too
            best[offset] = min(best.get(offset, float("inf")), time.perf_counter() - begin)
    everyone: list[tuple[dict[int, float], int]] = _gather((best, wrong))
    rates = [
        (NBYTES / seconds, n, (n + offset) % world) for n, (of, _) in enumerate(everyone) for offset, seconds in of.items()
    ]
    (low, src, dst), (high, *_) = min(rates), max(rates)
    damaged = [n for n, (_, count) in enumerate(everyone) if count]
    found = f"{low / 1e9:.2g} to {high / 1e9:.2g} GB/s each way, all at once; slowest from rank {src} to {dst}"
    if damaged:
        return Finding(
            "neighbours", f"{found}; {format_ranks(damaged, world)} received damaged bytes", "do not train on this network"
        )
    return Finding("neighbours", found)


def _hosts(own: list[Finding]) -> Iterator[Finding]:
    """What each host finds for itself, told once where hosts agree. `own`: empty on all but one rank of a host."""
    told: dict[Finding, list[int]] = {}
    by_rank: list[list[Finding]] = _gather(own)
    asked = [rank for rank, findings in enumerate(by_rank) if findings]
    for rank in asked:
        for finding in by_rank[rank]:
            told.setdefault(Finding(*finding), []).append(rank)
    for finding, ranks in told.items():
        if finding.what in ("python", "torch", "ringattn", "torchrun"):
            continue  # said above, of all ranks
        where = "" if ranks == asked else f" (host of {format_ranks(ranks, len(by_rank))})"
        yield finding._replace(found=finding.found + where)


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
