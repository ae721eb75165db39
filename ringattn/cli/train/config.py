"""Defines the flags of `ringattn train` and what follows from them alone. No torch is imported here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ringattn import InputError
from ringattn.cli.train.plots import check_available

MOST = 1 << 48  # no count of a run is larger
SHORT = 60  # digits of a number that an error message repeats

# What may differ between a run and its continuation: everything else decides what is learned.
MAY_CHANGE = (
    *("data", "schedule", "layout", "ulysses", "kernel"),
    *("steps", "out", "save_every", "resume", "auto_resume", "any_world", "plots", "journal"),
)


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
    """Merge tokens for the blocks in the middle: pairs, similar ones inside windows, words; or delete what a gate rejects."""
    merge_layers: tuple[int, int] = (1, 2)
    """Blocks [first, last) that run on the shorter sequence."""
    merge_factor: int = 2
    """Tokens in a window of --merge windows."""
    merge_window: int = 16
    """Tokens in a window of --merge similar."""
    merge_remove: float = 0.5
    """Share of tokens that merge into others (similar), or that the gate shall delete."""
    merge_how: Literal["mean", "last", "learned"] = "mean"
    """What represents a group: the mean of its tokens, the last one, or a learned mean."""
    steps: int = 40
    """Optimizer steps in all, those before a resume included."""
    lr: float = 4e-3
    """Learning rate at its peak, at the end of the warm-up; from there it falls with the square root of the step."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
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
    """Directory for event logs: each rank writes a JSON line for each thing it does, with whom it waited for and how long."""
    plots: bool = True
    """Draw the loss curve and the schedule's timeline (needs matplotlib)."""

    def check(self) -> None:
        """Raise `InputError` for flags that cannot work; the model and the plan check their own."""
        for name in ("seq_len", "batch", "steps", "warmup"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"--{name.replace('_', '-')} {_short(getattr(self, name))}: must be 1 or more, up to {MOST:,}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive")
        if not math.isfinite(self.lr):
            raise InputError(f"--lr {self.lr}: must be finite")
        if self.save_every < 0:
            raise InputError(f"--save-every {_short(self.save_every)}: must be 0 (only at the end) or more")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {_short(self.seed)}: must be 0 or more, below 2^63")
        if not self.out.name or self.out.name == "..":
            raise InputError(f"--out {self.out}: must be a directory with a name of its own, which can be moved aside")
        if self.plots:
            check_available()

    def identity(self) -> dict[str, Any]:
        """The flags that decide what is learned: a checkpoint belongs to them."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}

    def learning_rate(self, step: int) -> float:
        """For step 1, 2, ...; no horizon, so that a run can be continued beyond its --steps as if it had been longer."""
        return self.lr * min(step / self.warmup, math.sqrt(self.warmup / step))


def _short(number: int) -> str:
    digits = str(number)
    return digits if len(digits) <= SHORT else f"{digits[: SHORT // 2]}...{digits[-SHORT // 2 :]}"
