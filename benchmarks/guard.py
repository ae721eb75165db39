"""What agreement before movement and the failure board cost: seconds of one agreement beside those of one attention call.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/guard.py

gloo agrees on every call, NCCL on the first of a kind, and so does gloo with `strict=False`: then what is left is to look the
call up. Medians over interleaved calls, of the slowest rank; CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import tyro
from clock import slowest

import ringattn
from ringattn.comm import agree
from ringattn.faults import comm_errors

FIELDS = {"plan": "0" * 16, "batch": 1, "dtype": torch.float32, "scale": None, "key_bias": False}


@dataclass(frozen=True)
class Config:
    """One attention layer."""

    rows: int = 1024
    """Of each rank."""
    heads: int = 16
    head_dim: int = 64
    rounds: int = 30


def main(config: Config) -> None:
    mesh = ringattn.init()
    world, rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    shape: dict[str, Any] = dict(heads=config.heads, head_dim=config.head_dim, topology="cpu")
    plan = ringattn.make_plan(config.rows * world, world=world, **shape)
    q, k, v = torch.randn(3, 1, plan.rows(rank), config.heads, config.head_dim).unbind()
    calls, loose, agreements = [], [], []
    for _ in range(config.rounds):
        calls.append(slowest(lambda: ringattn.attention(q, k, v, plan)))
        loose.append(slowest(lambda: ringattn.attention(q, k, v, plan, strict=False)))
        agreements.append(slowest(lambda: agree(group, FIELDS)))
    begin = perf_counter()
    for _ in range(1000):
        agree(group, FIELDS, every_call=False)
    known = (perf_counter() - begin) / 1000
    begin = perf_counter()
    for _ in range(1000):
        with comm_errors("waiting", "", None):
            pass
    watched = (perf_counter() - begin) / 1000
    if rank == 0:
        call, agreement = median(calls), median(agreements)
        print(f"{world} ranks, {config}\n{plan}")
        print(f"attention {call * 1e3:.2f} ms; one agreement {agreement * 1e3:.3f} ms, {agreement / call:.2%} of it")
        print(f"strict=False: attention {median(loose) * 1e3:.2f} ms; a known call {known * 1e6:.1f} us, {known / call:.3%}")
        print(f"the board: {watched * 1e6:.1f} us for each wait")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
