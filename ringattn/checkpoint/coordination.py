"""Coordinates ranks around checkpoint files: compares arguments, lets rank 0 act, and raises errors on all ranks."""

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


def collective_errors(doing: str, about: object = "") -> AbstractContextManager[None]:
    """Wraps a collective checkpoint operation: a `CommError` names the failed rank."""
    return comm_errors(doing, f"rank {rank()}: {doing} {{about}} failed", about)


def all_gather_values(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, by rank."""
    if world() == 1:
        return [own]
    values_by_rank: list[T] = [own] * world()
    dist.all_gather_object(values_by_rank, own, group=group)
    return values_by_rank


def run_and_agree(action: Callable[[], T], **same: object) -> T:
    """Runs `action` on every rank and returns its result; collective.

    What `action` raises on any rank is raised on all, since the others would wait for it; values of `same` that differ between
    ranks raise `CheckpointError` on all.
    """
    results: list[T] = []
    own_problem = error_message(lambda: results.append(action()))
    with collective_errors("comparing what ranks are to do"):
        values_by_rank = all_gather_values((own_problem, {name: short_repr(value) for name, value in same.items()}))
    problems = [problem for problem, _ in values_by_rank]
    for number, problem in enumerate(problems):
        if problem:
            raise CheckpointError(problem if len(set(problems)) == 1 else f"on rank {number}: {problem}")
    for name in same:
        first, *others = (values[name] for _, values in values_by_rank)
        for number, other in enumerate(others, start=1):
            if other != first:
                raise CheckpointError(f"{name} is {first} on rank 0 and {other} on rank {number}; pass the same on every rank")
    return results[0]


def gather_dicts(action: Callable[[], dict[str, T]], failure: str, group: dist.ProcessGroup | None = None) -> dict[str, T]:
    """Joins the results of `action` on all ranks; collective. An `OSError` of any rank is a `CheckpointError` on all."""
    own: dict[str, T] = {}
    own_problem = None
    try:
        own = action()
    except OSError as error:
        own_problem = f"{failure}: {error}"
    values_by_rank = all_gather_values((own, own_problem), group)
    if problem := next((problem for _, problem in values_by_rank if problem), None):
        raise CheckpointError(problem)
    return {name: value for of_rank, _ in values_by_rank for name, value in sorted(of_rank.items())}


def on_first_rank(action: Callable[[], None], failure: str, group: dist.ProcessGroup | None = None) -> None:
    """Runs `action` on rank 0 while all wait; an `OSError` there is a `CheckpointError` on all."""
    problem: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [f"{failure}: {error}"]
    if world() > 1:
        dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


def from_first_rank(action: Callable[[], T], failure: str) -> T:
    """Runs `action` on rank 0 and returns its result on all ranks; an `OSError` there is a `CheckpointError` on all."""
    results: list[T] = []
    own_problem: str | None = None
    if rank() == 0:
        try:
            results.append(action())
        except OSError as error:
            own_problem = f"{failure}: {error}"
    with collective_errors("hearing from rank 0"):
        problem, of_first = all_gather_values((own_problem, results))[0]
    if problem:
        raise CheckpointError(problem)
    return of_first[0]
