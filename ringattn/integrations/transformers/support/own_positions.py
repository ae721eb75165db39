"""Finds out, by running it, what a model makes of positions that it is not given, and whether it separates documents by them.

`shard_batch` counts 0, 1, 2, ... where a batch has no position_ids, and begins a document where positions begin anew. Some
models count otherwise (RoBERTa from its padding's number on, OPT the tokens alone, so that left padding shifts them), and the
masks of some do not look at positions, so that in one process documents see each other. Such a batch would give other numbers
on shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ringattn.errors import InputError, PlanError
from ringattn.integrations.transformers.support.rowwise import ROWS, Probe, apart, few_rows, undisturbed

PADDED = 3  # rows of left padding
DOCUMENT = ROWS // 2
KEPT = torch.arange(DOCUMENT, ROWS)


def unlike_counting(model: Any, kwargs: Mapping[str, Any], rows: int, padded_left: bool) -> str | None:
    """Why position_ids have to be given to this model, or None. kwargs: of a call on `rows` rows; padded_left: as the batch."""
    counted, own = Probe(KEPT), Probe(KEPT, lenient=True)
    few = few_rows(kwargs, rows, torch.arange(ROWS), own)
    if padded_left:
        few = _padded(few, getattr(model.config.get_text_config(), "pad_token_id", None))
    without = {name: value for name, value in few.items() if name not in ("position_ids", "attention_mask")}
    first = next(value for value in few.values() if isinstance(value, Tensor))
    positions = torch.arange(ROWS, device=first.device).unsqueeze(0)
    try:
        with undisturbed(model):
            model(**without | {"attention_mask": few["attention_mask"]} if padded_left else without)
            model(**without | {"position_ids": positions, "ringattn": counted})
    except (InputError, PlanError) as error:
        return str(error)
    except Exception as error:
        name = type(model).__name__
        return f"{name} does not run without position_ids ({type(error).__name__}: {error}); put them into the batch"
    pairs = zip(own.calls, counted.calls, strict=True)
    if not any(apart(a, b) for (_, found), (_, expected) in pairs for a, b in zip(found, expected, strict=True)):
        return None
    return (
        f"{type(model).__name__} does not count positions 0, 1, 2, ... where it is given none"
        f"{' and the left is padded' if padded_left else ''}, as shard_batch does: put position_ids (batch, seq_len) into the "
        "batch, whole, as the model makes them of the whole batch"
    )


def _padded(few: dict[str, Any], pad: int | None) -> dict[str, Any]:
    ids = few.get("input_ids")
    if ids is not None and pad is not None:
        few["input_ids"] = ids.clone()
        few["input_ids"][:, :PADDED] = pad
    shaped = next(value for value in (ids, few.get("inputs_embeds")) if value is not None)
    few["attention_mask"] = torch.ones(shaped.shape[:2], dtype=torch.int64, device=shaped.device)
    few["attention_mask"][:, :PADDED] = 0
    return few


def joined_documents(model: Any, kwargs: Mapping[str, Any], rows: int) -> str | None:
    """Why documents of a packed batch would see each other in one process, or None. kwargs: of a call on `rows` rows."""
    probe = Probe(None, lenient=True)
    few = few_rows(kwargs, rows, torch.arange(ROWS) % DOCUMENT, probe)
    try:
        with undisturbed(model):
            model(**few)
    except (InputError, PlanError) as error:
        return str(error)
    if all(probe.packed):
        return None
    return (
        f"position_ids begin anew, and the masks that {type(model).__name__} makes do not separate documents by them: in one "
        "process documents would see each other with sdpa and eager, and not with transformers' flash backends. For documents "
        "that are apart call shard_batch(..., documents_apart=True); for one causal sequence leave position_ids out, or let "
        "them go on"
    )
