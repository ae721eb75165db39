"""What a real rank does to show that it is right: each schedule, both passes, against the same plan simulated in its own process.

The simulated transport runs the same engine and kernel in the same order, so out and gradients must be equal to the bit.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import ringattn
from common import BOUNDS, backward, cut, dense, error, example, forward, plan_for, visible

HEADS, KV_HEADS, DIM, LENGTH = 8, 4, 64, 203
CALLS = 5


def schedules_are_right(device: torch.device, schedules: tuple[str, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each schedule, as this rank finds it; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.use_deterministic_algorithms(True, warn_only=True)  # or a kernel itself may differ from run to run
    e = example(LENGTH, HEADS, KV_HEADS, DIM, device=device, dtype=dtype)
    mask = ringattn.causal()
    exact = dense(e, visible(mask, LENGTH, device))[0]
    found = []
    for schedule in schedules:
        plan = plan_for(LENGTH, world, schedule, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, mask=mask)
        shards = cut(e, plan)
        outs = forward(plan, shards)
        expected = [outs[rank].detach(), *backward(outs, shards)[3 * rank : 3 * rank + 3]]
        mine, dout = shards.inputs[rank], shards.douts[rank]

        def both(mine: Any = mine, dout: Any = dout, plan: Any = plan) -> list[torch.Tensor]:
            out = ringattn.attention(mine.q, mine.k, mine.v, plan)
            return [out.detach(), *torch.autograd.grad(out, (mine.q, mine.k, mine.v), dout)]

        answer = both()
        equal = all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True))
        off = error(answer[0], exact[:, shards.rows[rank]])
        found.append({"schedule": schedule, "equal": equal, "off": off, "right": equal and off <= BOUNDS[dtype]})
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(CALLS):
            both()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[-1]["us"] = round(1e6 * (time.perf_counter() - begin) / CALLS, 1)
    return found


def judge(stage: Any, table: str, world: int, ended: list[Any], **cells: Any) -> None:
    """Rows and failures of a stage from what all ranks have found: the slowest time, right if right on each rank."""
    for rank, one in enumerate(ended):
        stage.check(not one.error, f"{table}, {world} ranks: rank {rank} {one.error}")
    if any(one.error for one in ended):
        return
    for rows in zip(*(one.result["rows"] for one in ended), strict=True):
        name = rows[0]["schedule"]
        right = all(row["right"] for row in rows)
        off = max(row["off"] for row in rows)
        stage.row(table, ranks=world, schedule=name, right=right, off=off, us=max(row["us"] for row in rows), **cells)
        bits = "" if all(row["equal"] for row in rows) else "not the bits of the simulated ranks; "
        stage.check(right, f"{table}, {world} ranks, {name}: {bits}out is off by {100 * off:.2g} %")
