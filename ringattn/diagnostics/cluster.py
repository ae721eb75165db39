"""Examines all ranks together: whether they can connect, run the same code, and how fast their links are.

    torchrun --nproc-per-node 8 -m ringattn doctor

Everything that a job depends on is tested first: connections pair by pair and by name, versions and the digests of the source
and of a plan, a message round the ring in both directions, its bytes compared. Findings are the same on every rank.
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
from ringattn.runtime.init import WARM_PEERS, connect, environment, init, wait_for_ranks

NBYTES = 8 << 20
REPEATS = 3
CLOCK_TOLERANCE = 1.0  # seconds; beyond this, times in logs of two hosts do not compare


def examine_together(timeout: float = 60.0) -> Iterator[Finding]:
    """Yields all findings, on every rank; collective over torchrun's ranks. The process group is destroyed at the end.

    Raises:
        LaunchError: torchrun's environment is wrong or a rank does not start; the message names it.
    """
    env = environment()
    rank, world = env["RANK"], env["WORLD_SIZE"]
    store = PrefixStore("ringattn/doctor", connect(env, timeout))
    wait_for_ranks(store, env, timeout)
    near = [(rank + n) % world for n in range(1, min(world, WARM_PEERS + 1))]
    store.set(f"cut off/{rank}", "; ".join(f"{peer} at {why}" for peer, why in unreachable(store, rank, near, 5.0).items()))
    cut_off = {n: peers for n in range(world) if (peers := store.get(f"cut off/{n}").decode())}
    if cut_off:
        pairs = "; ".join(f"rank {n} cannot connect to rank {peers}" for n, peers in cut_off.items())
        hint = "set GLOO_SOCKET_IFNAME to the interface that joins the hosts (see `ip address`), and open its ports"
        yield Finding("reachable peers", pairs, hint)
        return
    mesh = init(timeout=timeout)
    try:
        yield from _compare(_gather(rank_facts(env)))
        yield Finding("reachable peers", f"every rank connects to {'every other' if world <= WARM_PEERS else 'its neighbours'}")
        yield _clocks()
        if world > 1:
            yield _links(mesh)
        yield from _hosts(list(examine()) if env["LOCAL_RANK"] == 0 else [])
    finally:
        dist.destroy_process_group()


def rank_facts(env: Mapping[str, int]) -> dict[str, str]:
    """The host of this rank, then the values that must be equal on all ranks."""
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
    """The digest of all Python files of the package, with their names."""
    root = Path(ringattn.__file__).parent
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compare(everyone: list[dict[str, str]]) -> Iterator[Finding]:
    for what in everyone[0]:
        by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            by_value.setdefault(facts[what], []).append(rank)
        summary = "; ".join(f"{value} on {format_ranks(ranks, len(everyone))}" for value, ranks in by_value.items())
        if what == "ranks":
            yield Finding(what, f"{len(everyone)}: {summary}")
        else:
            hint = (
                "install the same on every host: ranks that differ disagree on plans, or on results"
                if len(by_value) > 1
                else ""
            )
            yield Finding(what, summary, hint)


def _clocks() -> Finding:
    """The least spread of several readings, each directly after a barrier."""
    spreads = []
    for _ in range(10):
        dist.barrier()
        spreads.append((max(times := _gather(time.time())) - min(times), times.index(max(times)), times.index(min(times))))
    spread, ahead, behind = min(spreads)
    hint = (
        f"synchronise clocks (chrony, ntp): times in the logs of ranks {ahead} and {behind} do not compare"
        if spread > CLOCK_TOLERANCE
        else ""
    )
    return Finding("clocks", f"within {spread:.2g} s of each other", hint)


def _links(mesh: DeviceMesh) -> Finding:
    """Sends from every rank to the next at once, then in the other direction. Bytes carry the sender's number."""
    group, rank, world = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    prepare(group)
    best: dict[int, float] = {}
    wrong = 0
    for offset in (1, -1):
        sent = torch.full((NBYTES,), rank % 251, dtype=torch.uint8, device=mesh.device_type)
        received = torch.empty_like(sent)
        to, source = (rank + offset) % world, (rank - offset) % world
        for _ in range(REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            finish([sending(sent, group, rank, to), receiving(received, group, rank, source)])
            wrong += int((received != source % 251).sum())  # also synchronises with a GPU
            best[offset] = min(best.get(offset, float("inf")), time.perf_counter() - begin)
    everyone: list[tuple[dict[int, float], int]] = _gather((best, wrong))
    rates = [
        (NBYTES / seconds, n, (n + offset) % world) for n, (of, _) in enumerate(everyone) for offset, seconds in of.items()
    ]
    (low, src, dst), (high, *_) = min(rates), max(rates)
    damaged = [n for n, (_, count) in enumerate(everyone) if count]
    rates_text = f"{low / 1e9:.2g} to {high / 1e9:.2g} GB/s each way, all at once; slowest from rank {src} to {dst}"
    if damaged:
        return Finding(
            "neighbours", f"{rates_text}; {format_ranks(damaged, world)} received damaged bytes", "do not train on this network"
        )
    return Finding("neighbours", rates_text)


def _hosts(own: list[Finding]) -> Iterator[Finding]:
    """Yields the findings of each host, once where hosts agree. own: empty on all but one rank of a host."""
    ranks_of: dict[Finding, list[int]] = {}
    by_rank: list[list[Finding]] = _gather(own)
    examined = [rank for rank, findings in enumerate(by_rank) if findings]
    for rank in examined:
        for finding in by_rank[rank]:
            ranks_of.setdefault(Finding(*finding), []).append(rank)
    for finding, ranks in ranks_of.items():
        if finding.what in ("python", "torch", "ringattn", "torchrun"):
            continue  # reported above for all ranks
        where = "" if ranks == examined else f" (host of {format_ranks(ranks, len(by_rank))})"
        yield finding._replace(outcome=finding.outcome + where)


def _gather(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
