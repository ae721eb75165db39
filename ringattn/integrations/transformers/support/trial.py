"""Tries a model before its first call on shards: that it is right on a part of a sequence is found by what it does.

What is tried, each once per model and group of ranks: that rows meet in ringattn alone (`rowwise`), that the model counts
positions as `shard_batch` does where a batch has none, and that its masks tell packed documents apart (`own_positions`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ringattn.comm.consistency import agree
from ringattn.comm.process_group import group_and_rank
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.support.own_positions import joined_documents, unlike_counting
from ringattn.integrations.transformers.support.rowwise import ROWS, joined_rows

TRIED = "_ringattn_tried"  # of a model: the set of what has been tried, by group


def try_model(model: Any, kwargs: Mapping[str, Any], shards: Shards) -> None:
    """Collective over the ranks of `shards`, the first time of each kind.

    Args:
        kwargs: of the call to come, whose tensors are of this rank's rows.

    Raises:
        InputError: the model would be wrong on rows. Raised on every rank.
    """
    group, _ = group_and_rank(shards.group, shards.layout.world)
    _try(model, kwargs, max(shards.rows, 1), kinds_of(shards), group, shards)


def try_rows(model: Any, kwargs: Mapping[str, Any], rows: int, group: dist.ProcessGroup) -> None:
    """As `try_model`, of rows alone, where there are no `Shards` yet. rows: of this rank."""
    _try(model, kwargs, rows, ("rows",), group, None)


def _try(
    model: Any,
    kwargs: Mapping[str, Any],
    rows: int,
    kinds: tuple[str, ...],
    group: dist.ProcessGroup | None,
    shards: Shards | None,
) -> None:
    ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
    for kind in kinds:
        if (kind, ranks) in vars(model).get(TRIED, ()):
            continue
        problem = _problem(model, kwargs, rows, kind, shards)
        agree(group, {"call": f"trying a model: {kind}", "model": type(model).__name__}, problem)
        _mark(model, (kind, ranks))


def kinds_of(shards: Shards) -> tuple[str, ...]:
    """What a model on these shards has to be tried for."""
    counted = () if shards.assumed is None else (shards.assumed,)
    return ("rows", *counted, *(("documents",) if shards.packed else ()))


@torch._dynamo.assume_constant_result  # runs while torch.compile traces the model's call
def problem_while_traced(number: int, kinds: tuple[str, ...]) -> str | None:
    """What is wrong with the model of this `id`, which is all that a traced call can pass. Every rank comes to the same."""
    model: Any = next(thing for thing in gc.get_objects() if id(thing) == number)
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(ROWS, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with _not_compiling():
        for kind in kinds:
            if any(kind == tried for tried, _ in vars(model).get(TRIED, ())):
                continue
            if problem := _problem(model, {"input_ids": ids, "position_ids": ids}, ROWS, kind, None):
                return problem
            _mark(model, (kind, ("traced",)))
    return None


@contextmanager
def _not_compiling() -> Iterator[None]:
    """The model runs here and is not traced, whatever the compiler says of the call around it."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _problem(model: Any, kwargs: Mapping[str, Any], rows: int, kind: str, shards: Shards | None) -> str | None:
    tries: dict[str, Callable[[], str | None]] = {
        "rows": lambda: joined_rows(model, kwargs, rows, shards),
        "counted": lambda: unlike_counting(model, kwargs, rows, padded_left=False),
        "counted, left padding": lambda: unlike_counting(model, kwargs, rows, padded_left=True),
        "documents": lambda: joined_documents(model, kwargs, rows),
    }
    return tries[kind]()


def _mark(model: nn.Module, what: tuple[str, tuple[object, ...]]) -> None:
    """Models within this one have been tried with it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).setdefault(TRIED, set()).add(what)
