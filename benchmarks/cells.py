"""The comparison as a table of cells: links x ranks x heads x mask, each a run of `compare.py` in the laboratory.

    python benchmarks/cells.py --out benchmarks/results/mesh            the cells that something is claimed of
    python benchmarks/cells.py --matrix --out benchmarks/results/all    every combination, `auto` against everybody

Every cell writes its own JSON as soon as it is done, with the command that made it; cells that are there already are not run
again. `cells_report.py` makes the table and the picture of them. Needs root and iproute2, as the laboratory does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

HERE = Path(__file__).parent
SLOW = ("ring-attention-pytorch", "torch", "stripe", "1 head")  # each has a faster sibling that moves the same bytes or fewer
OURS = ("auto", "ring", "bidirectional_ring", "token_ring", "mesh")


@dataclass(frozen=True)
class Cell:
    """One run. `emulate` in flop/s of a rank; 0 computes for real."""

    name: str
    links: str
    ranks: int
    mask: str
    heads: int = 8
    kv_heads: int = 8
    rows: int = 1024
    mbit: float = 50.0
    emulate: float = 0.0
    forward_only: bool = False
    rounds: int = 3
    schedules: tuple[str, ...] = ("auto", "token_ring")
    peers: tuple[str, ...] = ("",)
    without: tuple[str, ...] = SLOW

    def command(self, json: Path) -> list[str]:
        """Two nodes have uplinks half as fast as the links within."""
        words = f"{HERE}/netlab/run.py --kind {self.links} --hosts {self.ranks} --mbit {self.mbit:g} --timeout 900".split()
        words += ["--uplink-mbit", f"{self.mbit / 2:g}"] * (self.links in ("nodes", "rails"))
        words += ["--gflops", f"{self.emulate / 1e9 if self.emulate else 38 * min(1, 4 / self.ranks):g}"]
        words += (
            f"{HERE}/compare.py --topology {{topology}} --mask {self.mask} --rows {self.rows} --rounds {self.rounds}".split()
        )
        words += f"--heads {self.heads} --kv-heads {self.kv_heads} --emulate {self.emulate:g} --json {json}".split()
        words += ["--forward-only"] * self.forward_only
        return [*words, "--schedules", *self.schedules, "--peers", *self.peers, "--without", *self.without]


@dataclass(frozen=True)
class Config:
    """What to run."""

    out: Path
    """Folder for the JSON of every cell."""
    matrix: bool = False
    """Every combination instead of the cells that something is claimed of."""
    only: str = ""
    """Cells in whose name this occurs."""


ACCELERATOR = 50e9  # flop/s a rank: at 50 Mbit/s a link, compute and transfers are of the same order, as on GPUs


def claimed() -> Iterator[Cell]:
    """What docs/performance.md states."""
    yield Cell("mesh-4-full-forward", "mesh", 4, "full", forward_only=True)
    yield Cell("mesh-4-full-forward-emulated", "mesh", 4, "full", forward_only=True, emulate=ACCELERATOR)
    yield Cell("mesh-8-full-forward-emulated", "mesh", 8, "full", forward_only=True, emulate=ACCELERATOR)
    yield Cell("mesh-4-causal", "mesh", 4, "causal")
    yield Cell("mesh-4-causal-9-over-3", "mesh", 4, "causal", heads=9, kv_heads=3)
    yield Cell("switch-8-causal-6-heads-emulated", "switch", 8, "causal", heads=6, kv_heads=6, emulate=ACCELERATOR)
    for links in ("rails", "nodes"):
        yield Cell(f"{links}-4-full-forward", links, 4, "full", forward_only=True, schedules=("auto", "mesh", "token_ring"))


def matrix() -> Iterator[Cell]:
    """Emulated, so that all ranks compute at once, on half the rows, which bounds the hours."""
    for ranks, links, mask, kv_heads in product((4, 8, 2), ("mesh", "switch", "rails"), ("causal", "full"), (8, 2, 1)):
        yield Cell(
            f"{links}-{ranks}-{mask}-g{8 // kv_heads}",
            links,
            ranks,
            mask,
            kv_heads=kv_heads,
            rows=512,
            emulate=ACCELERATOR,
            rounds=2,
            schedules=(*OURS, f"ring+u{ranks}"),
            without=(*SLOW, "ulysses 1 x") if ranks < 8 else (*SLOW, "ulysses 1 x", "llama3"),
        )


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    for cell in matrix() if config.matrix else claimed():
        json = config.out / f"{cell.name}.json"
        if config.only in cell.name and not json.exists():
            print(f"\n{cell.name}", flush=True)
            subprocess.run([sys.executable, *cell.command(json)], check=False)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
