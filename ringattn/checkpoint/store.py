"""Checkpoints of replicated training state, on torch.distributed.checkpoint: whole or not there at all.

    runs/train/step_00000040/     a checkpoint: model, optimizer, random state; ringattn.json has step, world, config, digests
    runs/train/.step_00000050/    what was being written when the job died: never read, removed by the next save

All ranks write into the hidden directory, then rank 0 notes the digest of each file and renames it: a directory with the final
name is complete, and `resume` passes over one whose files have changed since, for the one before it. Every rank holds the same
parameters, so each tensor is stored once and any number of ranks can load it; with as many ranks as before, training
goes on bit by bit as it would have. On several hosts the directory must be on a file system they share.

`saver` writes in the background. What this does not do: sharded parameters (use DCP directly).
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
from ringattn.checkpoint.coordination import agreed, from_first_rank, joined, of_all, on_first_rank, rank, together, world
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
    """Write a checkpoint and return its path; collective over all ranks of the job.

    Args:
        directory: where the run's checkpoints live; made if missing.
        step: optimizer steps done so far.
        model: with the same parameters and buffers on every rank.
        optimizer: with the same state on every rank. torch's random state is saved too, each rank's own.
        config: whatever must be the same to go on (JSON values); `load` compares it.
        keep: so many newest checkpoints stay, older ones are deleted once this one is complete.

    Raises:
        CheckpointError: it could not be written. Raised on every rank; earlier checkpoints are untouched.
        CommError: a rank died or stalled meanwhile; earlier checkpoints are untouched.
    """
    agreed(lambda: fit(directory, config, (model, optimizer), step=step, keep=keep), step=step, keep=keep)
    state = state_of(model, optimizer)
    with together("saving a checkpoint", directory):
        return write(Path(directory), int(step), state, dict(config or {}), keep)


def write(
    directory: Path,
    step: int,
    state: dict[str, Any],
    config: Mapping[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `state` (of `state_of`) and give it its name; collective over `group`, by default all ranks. Else as `save`."""
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}"
    on_first_rank(lambda: clear(directory), f"cannot prepare {directory}", group)
    try:
        write_state(state, checkpoint_id=partial, process_group=group)
    except CheckpointException as error:
        free = shutil.disk_usage(directory).free  # DCP says "unexpected pos" when a disk is full
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # nobody will read it, and others may need the room
        raise CheckpointError(
            f"cannot write checkpoint {partial}, {free / 1e6:,.1f} MB were left free there: {_reasons(error)}. What was saved "
            "before is untouched"
        ) from error
    wrong = f"cannot complete checkpoint {final}"
    files = joined(lambda: digests(partial, rank()), wrong, group)
    about = {"step": step, "world": world(), "config": dict(config), "files": files}
    on_first_rank(lambda: publish(partial, final, about, keep), wrong, group)
    note("saved", checkpoint=final)
    return final


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in `directory`, or None."""
    found = complete(path_of("directory", directory, CheckpointError))
    return found[-1] if found else None


def resume(
    directory: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    any_world: bool = False,
) -> int:
    """`load` the newest checkpoint in `directory` that is as it was written; collective. Returns its step, 0 if there is none.

    One that is damaged is passed over with a warning that names the file.

    Raises:
        CheckpointError: there are checkpoints, but none is sound, or the newest sound one is of another `config` or model.
    """
    agreed(lambda: fit(directory, config, (model, optimizer), any_world=any_world))
    found = from_first_rank(lambda: list(map(str, complete(Path(directory)))), f"cannot look into {directory}")
    for checkpoint in reversed(found):
        problem = damage(checkpoint)
        if problem is None:
            return load(checkpoint, model, optimizer, config=config, any_world=any_world)
        warnings.warn(f"{problem}; using the one before it", stacklevel=2)
    if found:
        raise CheckpointError(f"no checkpoint in {directory} is sound: {problem}. Restore one, or start anew elsewhere")
    return 0


def damage(checkpoint: str | Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None; collective, and every rank reads its share of them."""
    try:
        checkpoint = path_of("checkpoint", checkpoint, CheckpointError)
        noted = sorted(about_of(checkpoint)["files"].items())
        own = changed(checkpoint, dict(noted[rank() :: world()]))
    except (CheckpointError, OSError) as error:
        own = str(error)
    with together("comparing digests", checkpoint):
        return next((said for said in of_all(own) if said), None)


def load(
    checkpoint: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: Mapping[str, Any] | None = None,
    any_world: bool = False,
) -> int:
    """Put a checkpoint's state into `model` and `optimizer`, and torch's random state back; collective. Returns its step.

    A rank takes back its own random state. With `any_world` another number of ranks may load it: what follows is then equal
    up to rounding only, since sums over ranks have another order, and more ranks than before share random states in turn.

    Raises:
        CheckpointError: there is none at this path, it is incomplete, or it was made with another `config`, another model, or
            (without `any_world`) another number of ranks. Digests are compared by `resume` and `damage`, which read every byte.
    """
    agreed(lambda: fit(checkpoint, config, (model, optimizer), any_world=any_world))
    checkpoint = Path(checkpoint)
    about = agreed(lambda: _loadable(checkpoint, model, dict(config or {}), any_world))
    state = state_of(model, optimizer, ranks=about["world"])
    try:
        with together("loading a checkpoint", checkpoint):
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
    """What is noted of a checkpoint that is of this `config`, world and model; raises `CheckpointError` of any other."""
    about = about_of(checkpoint)
    _compare(checkpoint, json.loads(json.dumps(config)), about["config"])
    if about["world"] != world() and not any_world:
        raise CheckpointError(
            f"checkpoint {checkpoint} was made by {about['world']} ranks and this job has {world()}: what follows would "
            "differ in its last bits. Start as many ranks, or pass any_world=True (to launch/train.py: --any-world)"
        )
    try:
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # pickle's own, and whatever a damaged pickle calls
        raise CheckpointError(f"checkpoint {checkpoint} is incomplete: {short_repr(error)}; {INSTEAD}") from error
    names = {f"model.{name}" for name in get_model_state_dict(model)}
    if unknown := [key for key in stored if key.startswith("model.") and key not in names]:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds more than this model has: {unknown[0]} and {len(unknown) - 1} more"
        )
    return about


def fit(
    where: str | Path,
    config: Mapping[str, Any] | None,
    trained: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None,
    *,
    step: int = 0,
    keep: int = 1,
    any_world: bool = False,
) -> None:
    """Raise `CheckpointError` for what is no path, no model, no optimizer, or no configuration that JSON can hold."""
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
    """What is stored, as it is now: the values to save, or the places to load into."""
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
        said = ", ".join(f"{name} is {mine.get(name)!r} and was {saved.get(name)!r}" for name in names)
        raise CheckpointError(
            f"checkpoint {checkpoint} belongs to another configuration: {said}. Pass the old values, or start anew"
        )


def _reasons(error: CheckpointException) -> str:
    """What DCP collected from all ranks, without its stacks."""
    return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
