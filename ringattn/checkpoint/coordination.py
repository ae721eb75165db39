"""What ranks do together where nothing but files changes: compare what they were given, let the first act, hear how it went."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch.distributed as dist

from ringattn._validation import error_message, short_repr
from ringattn.errors import CheckpointError
from ringattn.faults.watchdog import comm_errors

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def together(doing: str, about: object = "") -> AbstractContextManager[None]:
    """Around what all ranks do with checkpoints: a `CommError` says which of them is gone."""
    return comm_errors(doing, f"rank {rank()}: {doing} {{about}} failed", about)


def of_all(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank has, by rank."""
    if world() == 1:
        return [own]
    everyone: list[T] = [own] * world()
    dist.all_gather_object(everyone, own, group=group)
    return everyone


def agreed(action: Callable[[], T], **same: object) -> T:
    """What `action` finds on this rank. What it raises on any rank is raised on all, which would wait for that one else; and so
    is `CheckpointError` where the values of `same` differ."""
    found: list[T] = []
    problem = error_message(lambda: found.append(action()))
    with together("comparing what ranks are to do"):
        everyone = of_all((problem, {name: short_repr(value) for name, value in same.items()}))
    problems = [said for said, _ in everyone]
    for number, said in enumerate(problems):
        if said:
            raise CheckpointError(said if len(set(problems)) == 1 else f"on rank {number}: {said}")
    for name in same:
        first, *others = (values[name] for _, values in everyone)
        for number, other in enumerate(others, start=1):
            if other != first:
                raise CheckpointError(f"{name} is {first} on rank 0 and {other} on rank {number}; pass the same on every rank")
    return found[0]


def joined(action: Callable[[], dict[str, T]], failure: str, group: dist.ProcessGroup | None = None) -> dict[str, T]:
    """What all ranks find together. An `OSError` of any rank is a `CheckpointError` on all."""
    found: dict[str, T] = {}
    said = None
    try:
        found = action()
    except OSError as error:
        said = f"{failure}: {error}"
    everyone = of_all((found, said), group)
    if wrong := next((said for _, said in everyone if said), None):
        raise CheckpointError(wrong)
    return {name: one for of_rank, _ in everyone for name, one in sorted(of_rank.items())}


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


def from_first_rank(action: Callable[[], T], failure: str) -> T:
    """What rank 0 finds, on all ranks."""
    found: list[T] = []
    said: str | None = None
    if rank() == 0:
        try:
            found.append(action())
        except OSError as error:
            said = f"{failure}: {error}"
    with together("hearing from rank 0"):
        told = of_all((said, found))[0]
    if told[0]:
        raise CheckpointError(told[0])
    return told[1][0]
