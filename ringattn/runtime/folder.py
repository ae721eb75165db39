"""The files of a checkpoint: a folder that has its final name when it is complete, and notes the digest of each file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringattn.errors import CheckpointError

ABOUT = "ringattn.json"


def clear(directory: Path) -> None:
    """Make `directory`, and remove what jobs that died have left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in directory.glob(".step_*"):
        shutil.rmtree(left_over)


def publish(partial: Path, final: Path, about: Mapping[str, Any], keep: int) -> None:
    """Give a folder that is written its final name, and remove all but the `keep` newest."""
    files = {path.name: digest(path) for path in sorted(partial.iterdir())}
    with (partial / ABOUT).open("w") as file:
        json.dump({**about, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the same step again, after a resume from before it
        shutil.rmtree(final)
    partial.rename(final)
    for old in complete(final.parent)[:-keep]:
        shutil.rmtree(old)


def complete(directory: Path) -> list[Path]:
    """Those that have a final name, oldest first."""
    return sorted(
        path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and (path / ABOUT).exists()
    )


def about(checkpoint: Path) -> dict[str, Any]:
    """What `publish` has noted. Raises `CheckpointError` if it cannot be read."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"there is no checkpoint {checkpoint}; `latest(directory)` finds the newest complete one")
    try:
        noted = json.loads((checkpoint / ABOUT).read_text())
        numbers = {name: int(noted[name]) for name in ("step", "world")}
        return numbers | {name: dict(noted[name]) for name in ("config", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is incomplete or damaged ({ABOUT}: {error}); use the one before it, or start anew"
        ) from error


def changed(checkpoint: Path, files: Mapping[str, str]) -> str | None:
    """The first of `files`, digests by name, that is not what it was, in words."""
    for name, noted in files.items():
        found = digest(checkpoint / name) if (checkpoint / name).exists() else "missing"
        if found != noted:
            how = "is missing" if found == "missing" else f"has digest {found}, {noted} when it was written"
            return f"checkpoint {checkpoint} is damaged: {name} {how}"
    return None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
