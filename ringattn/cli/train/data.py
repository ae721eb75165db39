"""Reads the bytes to train on and draws windows of them, by seed and step alone: a resumed run sees what it would have seen."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ringattn import InputError

# Passed over in the standard library: packages installed into it, tests, and modules that are little but tables.
OTHERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def read_corpus(paths: Sequence[Path]) -> Tensor:
    """All text under `paths`, in a fixed order, as uint8 (bytes,); by default the Python standard library's own sources.

    Directories are searched for text: hidden files and files with a zero byte are passed over. Raises `InputError` when a path
    does not exist or nothing is found.
    """
    given = " ".join(map(str, paths))
    try:
        files = sorted(_standard_library()) if not paths else [file for path in paths for file in _files(path)]
        texts = [text for file in files if b"\0" not in (text := file.read_bytes())]
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no system takes such a path
        raise InputError(f"--data {given}: cannot be read ({error}); give text files, or directories") from error
    joined = b"\n".join(texts)
    if not joined and not paths:
        raise InputError("--data: this Python comes without sources of its standard library; give text files or directories")
    if not joined:
        raise InputError(f"--data {given}: no text found; give text files or directories that hold some")
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def windows(corpus: Tensor, *, seq_len: int, batch: int, seed: int, step: int) -> Tensor:
    """Random windows of `corpus` for one step: int64 (batch, seq_len). The same on every rank."""
    if len(corpus) < seq_len:
        raise InputError(f"--data holds {len(corpus)} bytes, less than one window of --seq-len {seq_len}; give more text")
    starts = np.random.default_rng((seed, step)).integers(0, len(corpus) - seq_len + 1, size=batch)
    return torch.stack([corpus[start : start + seq_len] for start in starts.tolist()]).long()


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file or directory")
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts))


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return (file for file in root.rglob("*.py") if not OTHERS.intersection(file.relative_to(root).parts))
