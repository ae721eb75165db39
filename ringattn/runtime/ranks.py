"""What ranks do together where nothing but files changes: compare what they were given, let the first act, hear how it went."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist

from ringattn.arguments import complaint
from ringattn.comm.board import transferring
from ringattn.errors import CheckpointError


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def together(doing: str, about: object = "") -> AbstractContextManager[None]:
    """Around what all ranks do with checkpoints: a `CommError` says which of them is gone."""
    return transferring(doing, f"rank {rank()}: {doing} {{about}} failed", about)


def of_all(own: str | None) -> list[str | None]:
    """What every rank says."""
    everyone = [own]
    if world() > 1:
        everyone = [None] * world()
        with together("comparing notes"):
            dist.all_gather_object(everyone, own)
    return everyone


def all_fit(check: Callable[[], object]) -> None:
    """Raise what `check` raises on any rank on all of them: the others would wait for it."""
    everyone = of_all(complaint(check))
    wrong = {number: said for number, said in enumerate(everyone) if said}
    if wrong:
        number, said = min(wrong.items())
        raise CheckpointError(said if world() == 1 or len(set(everyone)) == 1 else f"on rank {number}: {said}")


def on_first_rank(action: Callable[[], None], failure: str, group: dist.ProcessGroup | None = None) -> None:
    """Rank 0 does it, all wait for it and all learn how it went."""
    said: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except OSError as error:
            said = [f"{failure}: {error}"]
    if world() > 1:
        dist.broadcast_object_list(said, src=0, group=group)
    if said[0] is not None:
        raise CheckpointError(said[0])


def from_first_rank(action: Callable[[], Any]) -> Any:
    """What rank 0 finds, on all ranks."""
    found = [action() if rank() == 0 else None]
    if world() > 1:
        with together("hearing of checkpoints from rank 0"):
            dist.broadcast_object_list(found, src=0)
    return found[0]
