"""Writes checkpoints in the background while training continues.

`save` copies the state to the host and returns; a thread writes the copy, with collectives over a group of its own, so that
they never mix with those of training. One checkpoint is written at a time. Errors are raised by the next `save` or by `finish`,
on every rank alike. Files and names are those of `checkpoint`.

A training step pays for the copy only; benchmarks/checkpointing.py measures it against writing in the foreground.
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
from ringattn.checkpoint.coordination import run_and_agree
from ringattn.checkpoint.store import check_arguments, state_of, write
from ringattn.errors import CheckpointError
from ringattn.faults.watchdog import comm_errors


class Saver:
    """Writes checkpoints of a run into `directory` and keeps the newest `keep`. Collective over all ranks.

    config: values that must be equal to resume (JSON), as for `checkpoint.save`.
    timeout: seconds that a rank may wait for the others while a checkpoint is written, for the slowest disk.

    Raises:
        CheckpointError: an argument is invalid.
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
            check_arguments(directory, config, keep=keep)
            seconds("timeout", timeout, CheckpointError)

        run_and_agree(check, keep=keep)
        self.directory, self.config, self.keep = Path(directory), dict(config or {}), keep
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if distributed else None
        self._thread = ThreadPoolExecutor(1, "ringattn saver")
        self._writing: Future[Path] | None = None

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Starts writing the current state, once the previous checkpoint is complete; collective.

        Raises:
            CheckpointError: the previous checkpoint could not be written, or an argument is invalid. Raised on every rank;
                nothing new is started.
            CommError: as `finish`.
        """
        self.finish()
        run_and_agree(lambda: check_arguments(self.directory, self.config, (model, optimizer), step=step), step=step)
        state = copy_to_host(state_of(model, optimizer))
        self._writing = self._thread.submit(write, self.directory, int(step), state, self.config, self.keep, self._group)

    def finish(self) -> Path | None:
        """Waits for the checkpoint that is being written, and returns its path; None if there is none; collective.

        Raises:
            CheckpointError: it could not be written. Raised on every rank; earlier checkpoints are untouched.
            CommError: a rank died or stalled while it was written; earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        with comm_errors("waiting for a checkpoint", "the last checkpoint was not completed, earlier ones are untouched"):
            return writing.result()  # or raises what the thread's collectives raised because a rank failed


def copy_to_host(state: Any) -> Any:
    """Copies `state` with all tensors to the host, so that training may change the original."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(copy_to_host, state))
    return state
