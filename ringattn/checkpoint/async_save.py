"""Checkpoints that are written while training goes on.

`save` copies the state to the host and returns; a thread writes the copy, with collectives of its own over a group of its own,
so that they never mix with those of training. One checkpoint is written at a time. What goes wrong is raised by the next `save`
or by `finish`, on every rank alike. Files and names are those of `checkpoint`.

What a step pays is the copy; benchmarks/checkpointing.py measures it beside writing in the foreground.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn._validation import seconds
from ringattn.checkpoint.coordination import agreed
from ringattn.checkpoint.store import fit, state_of, write
from ringattn.errors import CheckpointError
from ringattn.faults.watchdog import comm_errors


class Saver:
    """Writes checkpoints of a run into `directory`, of which the newest `keep` stay. Collective to make, over all ranks.

    config: whatever must be the same to go on (JSON values), as for `checkpoint.save`.
    timeout: seconds that a rank may wait for the others while a checkpoint is written: for the slowest disk.

    Raises:
        CheckpointError: an argument cannot be.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        keep: int = 2,
        timeout: float = 600.0,
    ) -> None:

        def check() -> None:
            fit(directory, config, keep=keep)
            seconds("timeout", timeout, CheckpointError)

        agreed(check, keep=keep)
        self.directory, self.config, self.keep = Path(directory), dict(config or {}), keep
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if many else None
        self._thread = ThreadPoolExecutor(1, "ringattn saver")
        self._writing: Future[Path] | None = None

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write the state as it is now, once the checkpoint before is complete; collective.

        Raises:
            CheckpointError: the checkpoint before could not be written, or an argument cannot be. Raised on every rank; nothing
                new has begun.
            CommError: as `finish`.
        """
        self.finish()
        agreed(lambda: fit(self.directory, self.config, (model, optimizer), step=step), step=step)
        state = copied(state_of(model, optimizer))
        self._writing = self._thread.submit(write, self.directory, int(step), state, self.config, self.keep, self._group)

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written, and return its path; None if there is none; collective.

        Raises:
            CheckpointError: it could not be written. Raised on every rank; earlier checkpoints are untouched.
            CommError: a rank died or stalled while it was written; earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        with comm_errors("waiting for a checkpoint", "the last checkpoint was not completed, those before it are untouched"):
            return writing.result()  # or what the thread's collectives raised because a rank is gone


def copied(state: Any) -> Any:
    """`state` with every tensor copied to the host, so that training may change what it was."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(copied, state))
    return state
