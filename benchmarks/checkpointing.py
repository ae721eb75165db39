"""What a step pays for a checkpoint: none, one written in the foreground, and one written in the background.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/checkpointing.py

Rounds of a few training steps in each of the three ways, interleaved; the checkpoint is asked for after the first step of a
round, and the next round begins when it is on disk. Medians over rounds, of the slowest rank. CPU: whoever writes takes a core
from whoever computes, so the steps beside it are told apart from the one that asks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import tyro
from clock import slowest
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.checkpoint import Saver, save
from ringattn.nn import Decoder, DecoderConfig, reduce_gradients, shift_labels

WAYS = ("none", "foreground", "background")


@dataclass(frozen=True)
class Config:
    """The model, and how often."""

    seq_len: int = 2048
    dim: int = 512
    layers: int = 6
    steps: int = 4
    """In a round, the first of which is followed by a checkpoint."""
    rounds: int = 7


def main(config: Config) -> None:
    mesh = ringattn.init()
    world = mesh.size()
    plan = ringattn.make_plan(config.seq_len, world=world, heads=8, head_dim=config.dim // 8, topology="cpu")
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(256, config.dim, config.layers, 8, 8, config.dim // 8, 4 * config.dim))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (1, config.seq_len))
    rows, targets = ringattn.shard(tokens, plan), ringattn.shard(shift_labels(tokens), plan)

    def step() -> None:
        loss = model.loss(rows, targets, plan, mesh)
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients(model.parameters(), mesh)
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        saver, number = Saver(shared[0], keep=1), iter(range(1, 10**6))
        ask: dict[str, Callable[[], object]] = {
            "none": lambda: None,
            "foreground": lambda: save(Path(shared[0], "foreground"), next(number), model, optimizer, keep=1),
            "background": lambda: saver.save(next(number), model, optimizer),
        }
        results: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        step()  # makes the optimizer's state
        for _ in range(config.rounds):
            for way in WAYS:
                times = [slowest(step), slowest(ask[way]), *(slowest(step) for _ in range(config.steps - 1))]
                results[way].append([times[1], median(times[2:]), sum(times)])
                saver.finish()
        if mesh.get_local_rank() == 0:
            size = sum(path.stat().st_size for path in Path(shared[0]).rglob("*.distcp") if "foreground" in path.parts)
            _show(results, f"{world} ranks, checkpoints of {size / 1e6:.0f} MB, rounds of {config.steps} steps, {config}")
        dist.barrier()
    dist.destroy_process_group()


def _show(results: dict[str, list[list[float]]], title: str) -> None:
    table = Table("checkpoint", "asking, ms", "a step beside it, ms", "a round, s", "of one without", title=title)
    none = median(seconds for *_, seconds in results["none"])
    for way, rounds in results.items():
        asking, beside, whole = (median(column) for column in zip(*rounds, strict=True))
        table.add_row(way, f"{asking * 1e3:.1f}", f"{beside * 1e3:.0f}", f"{whole:.2f}", f"{whole / none:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
