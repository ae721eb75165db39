"""Tries a model before its first call on shards, since only running it shows whether it is correct on a part of a sequence.

Each trial runs once per model and group of ranks: that only ringattn mixes rows (`rowwise`), that the model counts positions as
`shard_batch` does where a batch has none, and that its masks separate packed documents (`own_positions`).
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
from ringattn.integrations.transformers.support.own_positions import document_problem, position_problem
from ringattn.integrations.transformers.support.rowwise import ROWS, row_mixing_problem

TRIED = "_ringattn_tried"  # attribute of a model: the completed trials, by group


def try_model(model: Any, kwargs: Mapping[str, Any], shards: Shards) -> None:
    """Runs the trials that this model still needs; collective over the ranks of `shards`.

    Args:
        model: of transformers.
        kwargs: of the coming call, with tensors of this rank's rows.
        shards: those of the call.

    Raises:
        InputError: the model would be wrong on shards. Raised on every rank.
    """
    group, _ = group_and_rank(shards.group, shards.layout.world)
    _try(model, kwargs, max(shards.rows, 1), trial_kinds(shards), group, shards)


def try_rows(model: Any, kwargs: Mapping[str, Any], rows: int, group: dist.ProcessGroup) -> None:
    """As `try_model` for row mixing alone, where there are no `Shards` yet. rows: of this rank."""
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
        _record_trial(model, (kind, ranks))


def trial_kinds(shards: Shards) -> tuple[str, ...]:
    """The kinds of trials that a model on these shards needs."""
    counted = () if shards.assumed is None else (shards.assumed,)
    return ("rows", *counted, *(("documents",) if shards.packed else ()))


@torch._dynamo.assume_constant_result  # runs while torch.compile traces the model's call
def traced_model_problem(number: int, kinds: tuple[str, ...]) -> str | None:
    """As `try_model` within a traced call, which can pass only an `id`: the problem, the same on every rank, or None."""
    model: Any = next(candidate for candidate in gc.get_objects() if id(candidate) == number)
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(ROWS, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with _not_compiling():
        for kind in kinds:
            if any(kind == tried for tried, _ in vars(model).get(TRIED, ())):
                continue
            if problem := _problem(model, {"input_ids": ids, "position_ids": ids}, ROWS, kind, None):
                return problem
            _record_trial(model, (kind, ("traced",)))
    return None


@contextmanager
def _not_compiling() -> Iterator[None]:
    """Runs the model untraced within a traced call."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _problem(model: Any, kwargs: Mapping[str, Any], rows: int, kind: str, shards: Shards | None) -> str | None:
    tries: dict[str, Callable[[], str | None]] = {
        "rows": lambda: row_mixing_problem(model, kwargs, rows, shards),
        "counted": lambda: position_problem(model, kwargs, rows, padded_left=False),
        "counted, left padding": lambda: position_problem(model, kwargs, rows, padded_left=True),
        "documents": lambda: document_problem(model, kwargs, rows),
    }
    return tries[kind]()


def _record_trial(model: nn.Module, what: tuple[str, tuple[object, ...]]) -> None:
    """Records a trial for the model and the models within it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).setdefault(TRIED, set()).add(what)
