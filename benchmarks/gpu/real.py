"""Shows in a real rank that it is right: each schedule, both passes, against the same plan simulated in its own process.

The simulated transport runs the same engine and kernel in the same order, so out and gradients must be equal to the bit.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
import torch.distributed as dist
from common import BOUNDS, backward, cut, dense, deterministic, error, example, forward, plan_for, synchronize, visible

import ringattn

HEADS, KV_HEADS, DIM, LENGTH = 8, 4, 64, 203
CALLS = 5


def schedules_are_right(device: torch.device, schedules: tuple[str, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each schedule, as this rank finds it; collective."""
    with deterministic():  # or a kernel itself may differ from run to run
        return [one_schedule(device, schedule, dtype) for schedule in schedules]


def one_schedule(device: torch.device, schedule: str, dtype: torch.dtype) -> dict[str, Any]:
    """Whether the bits are those of the simulated ranks, how far out is off, and microseconds of a call, both passes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    e, mask = example(LENGTH, HEADS, KV_HEADS, DIM, device=device, dtype=dtype), ringattn.causal()
    plan = plan_for(LENGTH, world, schedule, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, mask=mask)
    shards = cut(e, plan)
    outs = forward(plan, shards)
    expected = [outs[rank].detach(), *backward(outs, shards)[3 * rank : 3 * rank + 3]]
    q, k, v = shards.inputs[rank][:3]

    def both() -> list[torch.Tensor]:
        out = ringattn.attention(q, k, v, plan)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), shards.douts[rank])]

    results = both()
    equal = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    off = error(results[0], dense(e, visible(mask, LENGTH, device))[0][:, shards.rows[rank]])
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(CALLS):
        both()
    synchronize(device)
    seconds = (time.perf_counter() - begin) / CALLS
    right = equal and off <= BOUNDS[dtype]
    return {"schedule": schedule, "equal": equal, "off": off, "right": right, "us": round(1e6 * seconds, 1)}


def takes_transport() -> bool:
    """Whether this version of the library lets `init` choose the transport."""
    return "transport" in inspect.signature(ringattn.init).parameters


def judge(stage: Any, table: str, world: int, ended: list[Any], **cells: Any) -> None:
    """Rows and failures of a stage from what all ranks have found: the slowest time, right if right on each rank."""
    for rank, entry in enumerate(ended):
        stage.check(not entry.error, f"{table}, {world} ranks: rank {rank} {entry.error}")
    if any(entry.error for entry in ended):
        return
    for rows in zip(*(entry.result["rows"] for entry in ended), strict=True):
        name = rows[0]["schedule"]
        right = all(row["right"] for row in rows)
        off = max(row["off"] for row in rows)
        stage.row(table, ranks=world, schedule=name, right=right, off=off, us=max(row["us"] for row in rows), **cells)
        bits = "" if all(row["equal"] for row in rows) else "not the bits of the simulated ranks; "
        stage.check(right, f"{table}, {world} ranks, {name}: {bits}out is off by {100 * off:.2g} %")
