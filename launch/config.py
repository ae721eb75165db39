"""The flags of `train`, and what follows from them alone."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import plots
import torch

from ringattn import InputError
from ringattn._validation import MOST, path, shown
from ringattn.nn import Decoder, DecoderConfig, Merging, MergingDecoder

# What may differ between a run and its continuation: everything else decides what is learned.
MAY_CHANGE = (
    *("data", "schedule", "layout", "ulysses", "kernel"),
    *("steps", "out", "save_every", "resume", "auto_resume", "any_world", "plots", "journal"),
)


def memory() -> int:
    """Bytes that a rank may have: of its GPU, or its share of the host."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # that of a container, a number or "max"
    allowed = limit.read_text().strip() if limit.exists() else ""
    return min(host, int(allowed) if allowed.isdigit() else host) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class TrainConfig:
    """Train a byte-level language model on long contexts, the sequence cut over the ranks of torchrun."""

    data: tuple[Path, ...] = ()
    """Text files, or directories of them; by default the Python standard library's own sources."""
    seq_len: int = 8192
    """Bytes in a sequence; need not divide by anything."""
    batch: int = 1
    """Sequences in a step."""
    schedule: str = "token_ring"
    """What travels: auto, ring, bidirectional_ring, token_ring, mesh or all_gather."""
    layout: str = "auto"
    """Which rank holds which positions: auto, contiguous, zigzag or striped."""
    ulysses: int = 1
    """Ranks that share a sequence by heads instead; divides the number of ranks."""
    kernel: str = "auto"
    """Attention kernel on one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, gradients and the loss stay float32."""
    dim: int = 128
    """Width of the residual stream."""
    layers: int = 2
    """Blocks of attention and MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; divides --heads."""
    head_dim: int = 32
    """Width of a head; even."""
    hidden_dim: int = 384
    """Width inside the MLP."""
    merge: Literal["none", "windows", "similar", "words", "gate"] = "none"
    """Merge tokens for the blocks in the middle: pairs, similar ones inside windows, words, or delete what a gate says."""
    merge_layers: tuple[int, int] = (1, 2)
    """Blocks [first, last) that run on the shorter sequence."""
    merge_factor: int = 2
    """Tokens in a window of --merge windows."""
    merge_window: int = 16
    """Tokens in a window of --merge similar."""
    merge_remove: float = 0.5
    """Share of tokens that merge into others (similar), or that the gate shall delete."""
    merge_how: Literal["mean", "last", "learned"] = "mean"
    """What a group is: the mean of its tokens, the last one, or a learned mean."""
    steps: int = 40
    """Optimizer steps in all, those before a resume included."""
    lr: float = 4e-3
    """Learning rate at its peak, at the end of the warm-up; from there it falls with the square root of the step."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient; what is longer is scaled down."""
    seed: int = 0
    """Of the initial parameters and the order of the data."""
    out: Path = Path("runs/train")
    """Directory for metrics, checkpoints and pictures. A finished run found there is moved aside, not overwritten."""
    save_every: int = 20
    """Steps between checkpoints; 0 for only one, at the end."""
    resume: bool = False
    """Continue from the newest checkpoint in --out; an error when there is none."""
    auto_resume: bool = False
    """The same, but start anew when there is none: for jobs that are restarted or requeued."""
    any_world: bool = False
    """Continue on another number of ranks too: what is learned from there on differs by rounding."""
    journal: Path | None = None
    """Directory in which every rank notes what it does, a JSON line each time: who waited for whom, how long."""
    plots: bool = True
    """Draw the loss curve and the schedule's timeline (needs matplotlib)."""

    def check(self, world: int = 1) -> None:
        """Raise `InputError` for numbers that cannot work on `world` ranks; model and plan check their own."""
        for name in ("seq_len", "batch", "steps", "warmup"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"--{name.replace('_', '-')} {shown(getattr(self, name))}: must be 1 or more, up to {MOST:,}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive")
        if not math.isfinite(self.lr):
            raise InputError(f"--lr {self.lr}: must be finite")
        if self.save_every < 0:
            raise InputError(f"--save-every {shown(self.save_every)}: must be 0 (only at the end) or more")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {shown(self.seed)}: must be 0 or more, below 2^63")
        if not path("--out", self.out, InputError).name or self.out.name == "..":
            raise InputError(f"--out {self.out}: must be a directory with a name of its own, which can be moved aside")
        self._fits(world)
        if self.plots:
            plots.available()

    def _fits(self, world: int) -> None:
        """Raise `InputError` where the least that a rank holds is more than its machine has: said before it is allocated."""
        tokens, rows = self.batch * self.seq_len, self.batch * (self.seq_len // world)
        kept = 16 * self.shape().parameters  # value, gradient and two moments, four bytes each
        streams = 2 * self.layers * rows * self.dim * (2 if self.dtype == "bfloat16" else 4)
        there, needed = memory(), kept + 16 * tokens + streams
        if needed > there:
            raise InputError(
                f"a rank needs {needed / 1e9:,.1f} GB or more ({kept / 1e9:,.1f} for parameters and optimizer, the rest for "
                f"{self.batch:,} x {self.seq_len:,} tokens) and has {there / 1e9:,.1f}: lower --batch, --seq-len, --layers, "
                "--dim, --heads, --head-dim or --hidden-dim, or give the sequence more ranks"
            )

    def shape(self) -> DecoderConfig:
        return DecoderConfig(256, self.dim, self.layers, self.heads, self.kv_heads, self.head_dim, self.hidden_dim)

    def model(self, topology: str | None) -> Decoder:
        """With new parameters, from torch's global generator. topology: what attention is planned for, where tokens merge."""
        shape = self.shape()
        if self.merge == "none":
            return Decoder(shape)
        first, last = self.merge_layers
        numbers: dict[str, Any] = dict(factor=self.merge_factor, window=self.merge_window, remove=self.merge_remove)
        how = dict(how=self.merge_how) if self.merge != "gate" else {}
        return MergingDecoder(
            shape, Merging(self.merge, first, last, **numbers, **how, schedule=self.schedule, topology=topology)
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}

    def learning_rate(self, step: int) -> float:
        """For step 1, 2, ...; no horizon, so that a run can be continued beyond its --steps as if it had been longer."""
        return self.lr * min(step / self.warmup, math.sqrt(self.warmup / step))
