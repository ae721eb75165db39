"""Manages checkpoint folders: a folder gets its final name when it is complete, and records the digest of each file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader

from ringattn.errors import CheckpointError

ABOUT, METADATA = "ringattn.json", ".metadata"
BEFORE = ".before"  # suffix of a checkpoint of the same step, until the new one has its name


def clear(directory: Path) -> None:
    """Makes `directory`, and removes incomplete checkpoints of dead jobs."""
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in {*directory.glob(".step_*")} - {*complete(directory)}:
        shutil.rmtree(left_over)


def publish(partial: Path, final: Path, record: Mapping[str, Any], keep: int) -> None:
    """Gives a written folder its final name, and removes all but the `keep` newest, including this one.

    Raises `OSError` if a file is missing, or the folder cannot be renamed.
    """
    if missing := [name for name in sorted(_needed(partial)) if not (partial / name).exists()]:
        raise OSError(f"{missing[0]} is missing: all ranks must write into one directory, on a file system they share")
    with (partial / ABOUT).open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the same step again, after a resume from an earlier one: one of both always exists
        final.rename(partial.with_suffix(BEFORE))
    partial.rename(final)
    others = [path for path in complete(final.parent) if path != final]
    for old in [*final.parent.glob(f".step_*{BEFORE}"), *others[: max(0, len(others) + 1 - keep)]]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            warnings.warn(f"old checkpoint {old} cannot be removed: {error}", stacklevel=2)


def _needed(partial: Path) -> set[str]:
    """The files that a checkpoint's metadata lists, and the metadata file."""
    stored = FileSystemReader(partial).read_metadata().storage_data or {}
    return {entry.relative_path for entry in stored.values()} | {METADATA}


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first, including one that a dying job had just renamed for a new one of its step."""
    paths = {path.name: path for path in directory.glob("step_*")}
    for path in directory.glob(f".step_*{BEFORE}"):
        paths.setdefault(path.name[1:].removesuffix(BEFORE), path)
    steps = {int(name[5:]): path for name, path in paths.items() if re.fullmatch(r"step_\d{8,}", name)}
    return [path for _, path in sorted(steps.items()) if (path / ABOUT).exists()]


def about(checkpoint: Path) -> dict[str, Any]:
    """Reads the record of `publish`. Raises `CheckpointError` if it cannot be read."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"there is no checkpoint {checkpoint}; `latest(directory)` finds the newest complete one")
    try:
        recorded = json.loads((checkpoint / ABOUT).read_text())
        numbers = {name: int(recorded[name]) for name in ("step", "world")}
        return numbers | {name: dict(recorded[name]) for name in ("config", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is incomplete or damaged ({ABOUT}: {error}); use the one before it, or start anew"
        ) from error


def changed(checkpoint: Path, files: Mapping[str, str]) -> str | None:
    """A message on the first of `files`, digests by name, that has changed, or None."""
    for name, recorded in files.items():
        current = digest(checkpoint / name) if (checkpoint / name).exists() else "missing"
        if current != recorded:
            how = "is missing" if current == "missing" else f"has digest {current}, {recorded} when it was written"
            return f"checkpoint {checkpoint} is damaged: {name} {how}"
    return None


def digests(partial: Path, rank: int) -> dict[str, str]:
    """The digests of the files that `rank` has written."""
    own = [*partial.glob(f"__{rank}_*"), *([partial / METADATA] if rank == 0 else [])]
    return {path.name: digest(path) for path in own if path.exists()}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
