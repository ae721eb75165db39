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

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from ringattn.arguments import complaint, count, flag, instance, shown, whole
from ringattn.arguments import path as path_of
from ringattn.comm.board import transferring
from ringattn.comm.journal import note
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
        CommError: a rank died or stalled meanwhile; earlier checkpoints are untouched.
    """
    _all_fit(lambda: _fit(directory, model, optimizer, config, step=step, keep=keep))
    state = state_of(model, optimizer)
    with _together("saving a checkpoint", directory):
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
    step = count("step", step, CheckpointError, least=0)
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}"
    _on_first_rank(lambda: _clear(directory), f"cannot prepare {directory}", group)
    try:
        write_state(state, checkpoint_id=partial, process_group=group)
    except CheckpointException as error:
        free = shutil.disk_usage(directory).free  # DCP says "unexpected pos" when a disk is full
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # nobody will read it, and others may need the room
        raise CheckpointError(
            f"cannot write checkpoint {partial}, {free / 1e6:,.1f} MB were left free there: {_reasons(error)}. What was saved "
            "before is untouched"
        ) from error
    about = {"step": step, "world": _world(), "config": dict(config)}
    _on_first_rank(lambda: _publish(partial, final, about, keep), f"cannot complete checkpoint {final}", group)
    note("saved", checkpoint=final)
    return final


def check_keep(keep: int) -> None:
    """Raise `CheckpointError` for a number of checkpoints that would leave none."""
    if whole("keep", keep, CheckpointError) < 1:
        raise CheckpointError(f"keep={shown(keep)}: at least the checkpoint just written must stay; pass 1 or more")


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in `directory`, or None."""
    found = _complete(path_of("directory", directory, CheckpointError))
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
    _all_fit(lambda: _fit(directory, model, optimizer, config, any_world=any_world))
    found = _from_first_rank(lambda: list(map(str, _complete(Path(directory)))))
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
    checkpoint = path_of("checkpoint", checkpoint, CheckpointError)
    try:
        noted = sorted(_about(checkpoint)["files"].items())
    except CheckpointError as error:
        return str(error)
    own = None
    for name, digest in noted[_rank() :: _world()]:
        found = _digest(checkpoint / name) if (checkpoint / name).exists() else "missing"
        if found != digest:
            how = "is missing" if found == "missing" else f"has digest {found}, {digest} when it was written"
            own = f"checkpoint {checkpoint} is damaged: {name} {how}"
            break
    everyone: list[str | None] = [own]
    if _world() > 1:
        everyone = [None] * _world()
        with _together("comparing digests", checkpoint):
            dist.all_gather_object(everyone, own)
    return next((said for said in everyone if said), None)


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
    _all_fit(lambda: _fit(checkpoint, model, optimizer, config, any_world=any_world))
    checkpoint = Path(checkpoint)
    about = _about(checkpoint)
    _compare(checkpoint, json.loads(json.dumps(dict(config or {}))), about["config"])
    if about["world"] != _world() and not any_world:
        raise CheckpointError(
            f"checkpoint {checkpoint} was made by {about['world']} ranks and this job has {_world()}: what follows would "
            "differ in its last bits. Start as many ranks, or pass any_world=True (to launch/train.py: --any-world)"
        )
    state = state_of(model, optimizer, ranks=about["world"])
    try:
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        if unknown := [key for key in stored if key.startswith("model.") and key.removeprefix("model.") not in state["model"]]:
            raise CheckpointError(
                f"checkpoint {checkpoint} holds more than this model has: {unknown[0]} and {len(unknown) - 1} more"
            )
        with _together("loading a checkpoint", checkpoint):
            read_state(state, checkpoint_id=checkpoint)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is incomplete: {error}; use the one before it, or start anew"
        ) from error
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be loaded into this model: {_reasons(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    _set_random(state["random"][_random_key(about["world"])])
    note("resumed", checkpoint=checkpoint)
    return int(about["step"])


def _fit(
    where: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any] | None,
    *,
    step: int = 0,
    keep: int = 1,
    any_world: bool = False,
) -> None:
    """Raise `CheckpointError` for what is no path, no model, no optimizer, or no configuration that JSON can hold."""
    count("step", step, CheckpointError, least=0)
    check_keep(keep)
    flag("any_world", any_world, CheckpointError)
    path_of("path of a checkpoint, or directory of several", where, CheckpointError)
    instance("model", model, torch.nn.Module, CheckpointError, "give a torch.nn.Module")
    instance("optimizer", optimizer, torch.optim.Optimizer, CheckpointError, "give a torch optimizer")
    try:
        json.dumps(dict(config or {}))
    except Exception as error:
        raise CheckpointError(f"config={shown(config)}; must be a mapping of JSON values ({shown(error)})") from None


def _all_fit(check: Callable[[], object]) -> None:
    """Raise what `check` raises on any rank on all of them: the others would wait for it."""
    own = complaint(check)
    everyone: list[str | None] = [own]
    if _world() > 1:
        everyone = [None] * _world()
        with _together("comparing arguments"):
            dist.all_gather_object(everyone, own)
    wrong = {rank: said for rank, said in enumerate(everyone) if said}
    if wrong:
        rank, said = min(wrong.items())
        raise CheckpointError(said if _world() == 1 or len(set(everyone)) == 1 else f"on rank {rank}: {said}")


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: int | None = None) -> dict[str, Any]:
    """What is stored, as it is now: the values to save, or the places to load into."""
    instance("model", model, torch.nn.Module, CheckpointError, "give a torch.nn.Module")
    instance("optimizer", optimizer, torch.optim.Optimizer, CheckpointError, "give a torch optimizer")
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
    files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
    with (partial / ABOUT).open("w") as file:
        json.dump({**about, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
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
        numbers = {name: int(about[name]) for name in ("step", "world")}
        return numbers | {name: dict(about[name]) for name in ("config", "files")}
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


def _on_first_rank(action: Callable[[], None], failure: str, group: dist.ProcessGroup | None = None) -> None:
    """Rank 0 does it, all wait for it and all learn how it went."""
    said: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            said = [f"{failure}: {error}"]
    if _world() > 1:
        dist.broadcast_object_list(said, src=0, group=group)
    if said[0] is not None:
        raise CheckpointError(said[0])


def _from_first_rank(action: Callable[[], Any]) -> Any:
    """What rank 0 finds, on all ranks."""
    found = [action() if _rank() == 0 else None]
    if _world() > 1:
        with _together("hearing of checkpoints from rank 0"):
            dist.broadcast_object_list(found, src=0)
    return found[0]


def _together(doing: str, about: object = "") -> AbstractContextManager[None]:
    """Around what all ranks do with checkpoints: a `CommError` says which of them is gone."""
    return transferring(doing, f"rank {_rank()}: {doing} {{about}} failed", about)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
