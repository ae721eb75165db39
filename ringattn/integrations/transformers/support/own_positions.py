"""Tests by running a model which positions it makes when it gets none, and whether its masks separate packed documents.

`shard_batch` counts 0, 1, 2, ... where a batch has no position_ids, and begins a document where positions restart. Some models
count otherwise (RoBERTa from its padding index, OPT only the tokens, so that left padding shifts them), and the masks of some
ignore positions, so that documents see each other in one process. Such a batch would give other results on shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ringattn.errors import InputError, PlanError
from ringattn.integrations.transformers.support.rowwise import ROWS, Probe, differ, preserve_state, small_call

PADDED = 3  # rows of left padding
DOCUMENT = ROWS // 2
KEPT = torch.arange(DOCUMENT, ROWS)


def position_problem(model: Any, kwargs: Mapping[str, Any], rows: int, padded_left: bool) -> str | None:
    """The reason why this model needs position_ids, or None. kwargs: of a call on `rows` rows; padded_left: as the batch."""
    counted, own = Probe(KEPT), Probe(KEPT, lenient=True)
    small_kwargs = small_call(kwargs, rows, torch.arange(ROWS), own)
    if padded_left:
        small_kwargs = _padded(small_kwargs, getattr(model.config.get_text_config(), "pad_token_id", None))
    without = {name: value for name, value in small_kwargs.items() if name not in ("position_ids", "attention_mask")}
    first = next(value for value in small_kwargs.values() if isinstance(value, Tensor))
    positions = torch.arange(ROWS, device=first.device).unsqueeze(0)
    try:
        with preserve_state(model):
            model(**without | {"attention_mask": small_kwargs["attention_mask"]} if padded_left else without)
            model(**without | {"position_ids": positions, "ringattn": counted})
    except (InputError, PlanError) as error:
        return str(error)
    except Exception as error:
        name = type(model).__name__
        return f"{name} does not run without position_ids ({type(error).__name__}: {error}); put them into the batch"
    pairs = zip(own.calls, counted.calls, strict=True)
    if not any(differ(a, b) for (_, actual), (_, expected) in pairs for a, b in zip(actual, expected, strict=True)):
        return None
    return (
        f"{type(model).__name__} does not count positions 0, 1, 2, ... where it gets none"
        f"{' and the left is padded' if padded_left else ''}, as shard_batch does: put position_ids (batch, seq_len) into the "
        "batch, whole, as the model makes them for the whole batch"
    )


def _padded(small_kwargs: dict[str, Any], pad: int | None) -> dict[str, Any]:
    ids = small_kwargs.get("input_ids")
    if ids is not None and pad is not None:
        small_kwargs["input_ids"] = ids.clone()
        small_kwargs["input_ids"][:, :PADDED] = pad
    shaped = next(value for value in (ids, small_kwargs.get("inputs_embeds")) if value is not None)
    small_kwargs["attention_mask"] = torch.ones(shaped.shape[:2], dtype=torch.int64, device=shaped.device)
    small_kwargs["attention_mask"][:, :PADDED] = 0
    return small_kwargs


def document_problem(model: Any, kwargs: Mapping[str, Any], rows: int) -> str | None:
    """The reason why packed documents would see each other in one process, or None. kwargs: of a call on `rows` rows."""
    probe = Probe(None, lenient=True)
    small_kwargs = small_call(kwargs, rows, torch.arange(ROWS) % DOCUMENT, probe)
    try:
        with preserve_state(model):
            model(**small_kwargs)
    except (InputError, PlanError) as error:
        return str(error)
    if all(probe.packed):
        return None
    return (
        f"position_ids restart, and the masks that {type(model).__name__} makes do not separate documents by them: in one "
        "process documents would see each other with sdpa and eager, and not with transformers' flash backends. To "
        "separate documents call shard_batch(..., documents_apart=True); for one causal sequence leave position_ids out, or "
        "let "
        "them continue"
    )
