"""Checkpoints of replicated training state, on torch.distributed.checkpoint: whole or not there at all.

    runs/train/step_00000040/     a checkpoint: model, optimizer, random state, and ringattn.json (step, world, configuration)
    runs/train/.step_00000050/    what was being written when the job died: never read, removed by the next save

All ranks write into the hidden directory, then rank 0 renames it: a directory with the final name is complete. Every rank holds
the same parameters, so each tensor is stored once and any number of ranks can load it; with as many ranks as before, training
goes on bit by bit as it would have. On several hosts the directory must be on a file system they share.

What it does not do: sharded parameters (use DCP directly), or writing in the background.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from ringattn.errors import CheckpointError

ABOUT = "ringattn.json"


def save(
    directory: str | Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint and return its path; collective over all ranks of the job.

    Args:
        directory: where the run's checkpoints live; made if missing.
        step: optimizer steps done so far.
        model, optimizer: with the same state on every rank. torch's random state is saved too, each rank's own.
        config: whatever must be the same to go on (JSON values); `load` compares it.
        keep: so many newest checkpoints stay, older ones are deleted once this one is complete.

    Raises:
        CheckpointError: it could not be written. Raised on every rank; earlier checkpoints are untouched.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least the checkpoint just written must stay; pass 1 or more")
    directory = Path(directory)
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}"
    _on_first_rank(lambda: _clear(directory), f"cannot prepare {directory}")
    try:
        write_state(_state(model, optimizer), checkpoint_id=partial)
    except CheckpointException as error:
        raise CheckpointError(f"cannot write checkpoint {partial}: {_reasons(error)}") from error
    about = {"step": step, "world": _world(), "config": dict(config or {})}
    _on_first_rank(lambda: _publish(partial, final, about, keep), f"cannot complete checkpoint {final}")
    return final


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in `directory`, or None."""
    found = _complete(Path(directory))
    return found[-1] if found else None


def load(
    checkpoint: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Put a checkpoint's state into `model` and `optimizer`, and torch's random state back; collective. Returns its step.

    A rank takes back its own random state; when there are more ranks than before, they share what is there in turn.

    Raises:
        CheckpointError: there is none at this path, it is incomplete, or it was made with another `config` or another model.
    """
    checkpoint = Path(checkpoint)
    about = _about(checkpoint)
    _compare(checkpoint, json.loads(json.dumps(dict(config or {}))), about["config"])
    state = _state(model, optimizer, ranks=about["world"])
    try:
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        if unknown := [key for key in stored if key.startswith("model.") and key.removeprefix("model.") not in state["model"]]:
            raise CheckpointError(
                f"checkpoint {checkpoint} holds more than this model has: {unknown[0]} and {len(unknown) - 1} more"
            )
        read_state(state, checkpoint_id=checkpoint)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is incomplete: {error}; use the one before it, or start anew"
        ) from error
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be loaded into this model: {_reasons(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    _set_random(state["random"][_random_key(about["world"])])
    return int(about["step"])


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: int | None = None) -> dict[str, Any]:
    """What is stored, as it is now: the values to save, or the places to load into."""
    weights, moments = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return {"model": weights, "optimizer": moments, "random": {_random_key(ranks or _world()): random}}


def _set_random(random: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _random_key(ranks: int) -> str:
    return f"rank{_rank() % ranks}"


def _clear(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in directory.glob(".step_*"):
        shutil.rmtree(left_over)


def _publish(partial: Path, final: Path, about: Mapping[str, Any], keep: int) -> None:
    (partial / ABOUT).write_text(json.dumps(about, indent=1))
    if final.exists():  # the same step again, after a resume from before it
        shutil.rmtree(final)
    partial.rename(final)
    for old in _complete(final.parent)[:-keep]:
        shutil.rmtree(old)


def _complete(directory: Path) -> list[Path]:
    return sorted(
        path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and (path / ABOUT).exists()
    )


def _about(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_dir():
        raise CheckpointError(f"there is no checkpoint {checkpoint}; `latest(directory)` finds the newest complete one")
    try:
        about = json.loads((checkpoint / ABOUT).read_text())
        return {"step": int(about["step"]), "world": int(about["world"]), "config": dict(about["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is incomplete or damaged ({ABOUT}: {error}); use the one before it, or start anew"
        ) from error


def _compare(checkpoint: Path, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    names = [name for name in {**saved, **mine} if mine.get(name) != saved.get(name)]
    if names:
        said = ", ".join(f"{name} is {mine.get(name)!r} and was {saved.get(name)!r}" for name in names)
        raise CheckpointError(
            f"checkpoint {checkpoint} belongs to another configuration: {said}. Pass the old values, or start anew"
        )


def _reasons(error: CheckpointException) -> str:
    """What DCP collected from all ranks, without its stacks."""
    return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))


def _on_first_rank(action: Callable[[], None], failure: str) -> None:
    """Rank 0 does it, all wait for it and all learn how it went."""
    said: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            said = [f"{failure}: {error}"]
    if _world() > 1:
        dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise CheckpointError(said[0])


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
