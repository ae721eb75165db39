"""Saves and loads checkpoints of replicated training state with torch.distributed.checkpoint: complete or absent.

    runs/train/step_00000040/     a checkpoint: model, optimizer, random state; ringattn.json has step, world, config, digests
    runs/train/.step_00000050/    an incomplete checkpoint of a dead job: never read, removed by the next save

All ranks write into the hidden directory, then rank 0 records the digest of each file and renames it: a directory with the
final name is complete, and `resume` skips one whose files have changed since. Every rank holds the same parameters, so each
tensor is stored once and any number of ranks can load it; with as many ranks as before, training continues bit by bit. On
several hosts the directory must be on a shared file system.

`async_save` writes in the background. Sharded parameters are not supported (use DCP directly).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from ringattn._validation import as_int, count, flag, instance, short_repr
from ringattn._validation import path as path_of
from ringattn.checkpoint.coordination import (
    all_gather_values,
    collective_errors,
    from_first_rank,
    gather_dicts,
    on_first_rank,
    rank,
    run_and_agree,
    world,
)
from ringattn.checkpoint.directory import about as about_of
from ringattn.checkpoint.directory import changed, clear, complete, digests, publish
from ringattn.errors import CheckpointError
from ringattn.faults.event_log import note

INSTEAD = "use the one before it, or start anew"


def save(
    directory: str | Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes a checkpoint and returns its path; collective over all ranks of the job.

    Args:
        directory: where the run's checkpoints live; made if missing.
        step: optimizer steps done so far.
        model: with the same parameters and buffers on every rank.
        optimizer: with the same state on every rank. torch's random state is saved too, each rank's own.
        config: values that must be equal to resume (JSON); `load` compares them.
        keep: number of newest checkpoints to keep; older ones are deleted once this one is complete.

    Raises:
        CheckpointError: it could not be written. Raised on every rank; earlier checkpoints are untouched.
        CommError: a rank died or stalled during the save; earlier checkpoints are untouched.
    """
    run_and_agree(lambda: check_arguments(directory, config, (model, optimizer), step=step, keep=keep), step=step, keep=keep)
    state = state_of(model, optimizer)
    with collective_errors("saving a checkpoint", directory):
        return write(Path(directory), int(step), state, dict(config or {}), keep)


def write(
    directory: Path,
    step: int,
    state: dict[str, Any],
    config: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes `state` (of `state_of`) and gives it its final name; collective over `group`, by default all ranks. See `save`."""
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}"
    on_first_rank(lambda: clear(directory), f"cannot prepare {directory}", group)
    try:
        write_state(state, checkpoint_id=partial, process_group=group)
    except CheckpointException as error:
        free = shutil.disk_usage(directory).free  # DCP says "unexpected pos" when a disk is full
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # incomplete, and its disk space may be needed
        raise CheckpointError(
            f"cannot write checkpoint {partial}, {free / 1e6:,.1f} MB were left free there: {_reasons(error)}. Earlier "
            "checkpoints are untouched"
        ) from error
    wrong = f"cannot complete checkpoint {final}"
    files = gather_dicts(lambda: digests(partial, rank()), wrong, group)
    about = {"step": step, "world": world(), "config": dict(config), "files": files}
    on_first_rank(lambda: publish(partial, final, about, keep), wrong, group)
    note("saved", checkpoint=final)
    return final


def latest(directory: str | Path) -> Path | None:
    """Returns the complete checkpoint with the most steps in `directory`, or None."""
    checkpoints = complete(path_of("directory", directory, CheckpointError))
    return checkpoints[-1] if checkpoints else None


def resume(
    directory: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    any_world: bool = False,
) -> int:
    """Loads the newest undamaged checkpoint in `directory`; collective. Returns its step, 0 if there is none.

    A damaged one is skipped with a warning that names the file.

    Raises:
        CheckpointError: there are checkpoints, but none is sound, or the newest sound one is of another `config` or model.
    """
    run_and_agree(lambda: check_arguments(directory, config, (model, optimizer), any_world=any_world))
    checkpoints = from_first_rank(lambda: list(map(str, complete(Path(directory)))), f"cannot read {directory}")
    for checkpoint in reversed(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            return load(checkpoint, model, optimizer, config=config, any_world=any_world)
        warnings.warn(f"{problem}; using the one before it", stacklevel=2)
    if checkpoints:
        raise CheckpointError(f"no checkpoint in {directory} is sound: {problem}. Restore one, or start anew elsewhere")
    return 0


def damage(checkpoint: str | Path) -> str | None:
    """Checks the files of a checkpoint; returns a message on the damage, or None. Collective; every rank reads its share."""
    try:
        checkpoint = path_of("checkpoint", checkpoint, CheckpointError)
        recorded = sorted(about_of(checkpoint)["files"].items())
        own = changed(checkpoint, dict(recorded[rank() :: world()]))
    except (CheckpointError, OSError) as error:
        own = str(error)
    with collective_errors("comparing digests", checkpoint):
        return next((problem for problem in all_gather_values(own) if problem), None)


def load(
    checkpoint: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    any_world: bool = False,
) -> int:
    """Loads a checkpoint into `model` and `optimizer`, and restores torch's random state; collective. Returns its step.

    A rank restores its own random state. With `any_world` another number of ranks may load it: training is then equal up to
    rounding only, since sums over ranks have another order, and additional ranks reuse random states in turn.

    Raises:
        CheckpointError: there is none at this path, it is incomplete, or it was made with another `config`, another model, or
            (without `any_world`) another number of ranks. Digests are compared by `resume` and `damage`, which read every byte.
    """
    run_and_agree(lambda: check_arguments(checkpoint, config, (model, optimizer), any_world=any_world))
    checkpoint = Path(checkpoint)
    about = run_and_agree(lambda: _loadable(checkpoint, model, dict(config or {}), any_world))
    state = state_of(model, optimizer, ranks=about["world"])
    try:
        with collective_errors("loading a checkpoint", checkpoint):
            read_state(state, checkpoint_id=checkpoint)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete: {error}; {INSTEAD}") from error
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be loaded into this model: {_reasons(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    _set_random(state["random"][_random_key(about["world"])])
    note("resumed", checkpoint=checkpoint)
    return int(about["step"])


def _loadable(checkpoint: Path, model: torch.nn.Module, config: Mapping[str, Any], any_world: bool) -> dict[str, Any]:
    """Returns the record of a checkpoint with this `config`, world and model; raises `CheckpointError` for any other."""
    about = about_of(checkpoint)
    _compare(checkpoint, json.loads(json.dumps(config)), about["config"])
    if about["world"] != world() and not any_world:
        raise CheckpointError(
            f"checkpoint {checkpoint} was made by {about['world']} ranks and this job has {world()}: what follows would "
            "differ in its last bits. Start as many ranks, or pass any_world=True (to launch/train.py: --any-world)"
        )
    try:
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle may raise any type
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete: {short_repr(error)}; {INSTEAD}") from error
    names = {f"model.{name}" for name in get_model_state_dict(model)}
    if unknown := [key for key in stored if key.startswith("model.") and key not in names]:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds more than this model has: {unknown[0]} and {len(unknown) - 1} more"
        )
    return about


def check_arguments(
    where: str | Path,
    config: Mapping[str, Any] | None,
    trained: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None,
    *,
    step: int = 0,
    keep: int = 1,
    any_world: bool = False,
) -> None:
    """Raises `CheckpointError` for an invalid path, model, optimizer or config."""
    count("step", step, CheckpointError, least=0)
    if as_int("keep", keep, CheckpointError) < 1:
        raise CheckpointError(f"keep={short_repr(keep)}: at least the checkpoint just written must stay; pass 1 or more")
    flag("any_world", any_world, CheckpointError)
    path_of("path of a checkpoint, or directory of several", where, CheckpointError)
    if trained is not None:
        model, optimizer = trained
        instance("model", model, torch.nn.Module, CheckpointError, "give a torch.nn.Module")
        instance("optimizer", optimizer, torch.optim.Optimizer, CheckpointError, "give a torch optimizer")
    try:
        json.dumps(dict(config or {}))
    except Exception as error:
        raise CheckpointError(f"config={short_repr(config)}; must be a mapping of JSON values ({short_repr(error)})") from None


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: int | None = None) -> dict[str, Any]:
    """The current state: the values to save, or the tensors to load into."""
    weights, moments = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return {"model": weights, "optimizer": moments, "random": {_random_key(ranks or world()): random}}


def _set_random(random: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _random_key(ranks: int) -> str:
    return f"rank{rank() % ranks}"


def _compare(checkpoint: Path, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    names = [name for name in {**saved, **mine} if mine.get(name) != saved.get(name)]
    if names:
        differences = ", ".join(f"{name} is {mine.get(name)!r} and was {saved.get(name)!r}" for name in names)
        raise CheckpointError(
            f"checkpoint {checkpoint} belongs to another configuration: {differences}. Pass the old values, or start anew"
        )


def _reasons(error: CheckpointException) -> str:
    """The errors that DCP collected from all ranks, without stack traces."""
    return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
