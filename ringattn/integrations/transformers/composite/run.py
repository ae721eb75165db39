"""Runs a model with towers beside its text (vision, audio) on a whole batch, with its text decoder on this rank's rows.

Embeddings, towers and whatever the model makes of them (positions of images, masks, embeddings merged into the text) are
computed of the whole batch, alike on every rank. What the text decoder is given is cut, and what it returns is rows. In
backward only a rank's part of the embeddings has a gradient: summed over the ranks, parameters of the towers have that of one
process, as those of the decoder have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers import routers
from ringattn.integrations.transformers.attention_interface import NAME, shard_batch
from ringattn.integrations.transformers.batch import ImageBlocks, Shards
from ringattn.integrations.transformers.layers import MaskInfo
from ringattn.integrations.transformers.mask_functions import MaskReading, blocks_of
from ringattn.integrations.transformers.support.trial import try_model

LEFT_OUT = ("use_cache", "return_dict")


def cut_for_decoder(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], group: Group | None, sharding: Mapping[str, Any]
) -> dict[str, Any]:
    """What a text decoder is given of the whole sequence, cut for this rank, with `Shards`.

    Tensors (batch, seq_len, ...) are cut along dim 1, positions along the last dim. Tensors with a row for each token that a
    bool (batch, seq_len) marks, as Qwen3-VL's features of later layers, keep the rows of this rank's tokens.

    Raises:
        InputError: an argument cannot be cut. Raised on every rank.
    """
    given = {name: value for name, value in arguments_of(decoder, args, kwargs).items() if value is not None}
    if given.pop("labels", None) is not None and "labels" in inspect.signature(decoder.forward).parameters:
        raise InputError(f"{type(decoder).__name__}, the text decoder, is given labels and makes a loss of its rows alone")
    cache = given.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length():
        raise InputError("past_key_values: a cache cannot be cut over ranks; leave it out")
    tokens, blocks, packed = _from_masks(given.pop("attention_mask", None), decoder)
    if packed and given.get("position_ids") is None:
        raise InputError(f"a model tells documents apart by positions that it does not give to {type(decoder).__name__}")
    if tokens is not None:
        given["attention_mask"] = tokens
    shape = tuple(_sequence(given).shape[:2])
    marked = {name: value for name, value in given.items() if name != "attention_mask" and _of_marked(name, value, shape)}
    rest = {name: value for name, value in given.items() if name not in marked}
    text = copy(decoder.config.get_text_config())  # type: ignore[union-attr, operator]
    if blocks and all(blocks.values()) and getattr(text, "use_bidirectional_attention", None) is True:
        text.use_bidirectional_attention = False  # PaliGemma's says so, and means the blocks of its masks
    own, _ = shard_batch(routers.left_to_the_caller(rest, text), text, group, **sharding)
    own = routers.restored(own, rest)
    shards: Shards = own[NAME]
    shards.check_outputs = False
    shards.blocks = blocks
    _, rank = group_and_rank(shards.group, shards.layout.world)
    own |= _cut_marked(marked, rest, shards, rank) | {"return_dict": True}
    if not torch.compiler.is_compiling():
        try_model(decoder, own, shards)
    return own


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return {name: value for name, value in given.items() if name not in LEFT_OUT}


def _sequence(given: Mapping[str, Any]) -> Tensor:
    found = given.get("inputs_embeds", given.get("input_ids"))
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise InputError(f"a text decoder is given neither inputs_embeds nor input_ids, only {', '.join(given)}")
    return found


def _from_masks(mask: Any, decoder: nn.Module) -> tuple[Tensor | None, dict[int | None, ImageBlocks | None], bool]:
    """What a model's mask for its decoder says: padding, blocks by the window of layers, whether documents are separated."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask, {}, False
    infos = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    name = type(decoder).__name__
    if not all(isinstance(info, MaskInfo) for info in infos):
        shapes = [tuple(getattr(info, "shape", ())) for info in infos]
        raise InputError(f"{name} is given a mask made by hand, of shape {shapes}, which ringattn cannot cut over ranks")
    blocks: dict[int | None, ImageBlocks | None] = {}
    tokens = next((info.tokens for info in infos if info.tokens is not None), None)
    for info in infos:
        reading = info.reading or MaskReading(unknown="unread in a compiled graph")
        if reading.unknown or not reading.causal:
            raise InputError(
                f"{name} is given a mask that is {reading.unknown or 'not causal'}, which ringattn cannot cut over ranks"
            )
        blocks[reading.window] = blocks_of(reading, tokens)
    packed = any(info.reading.packed for info in infos)
    return tokens, blocks if any(blocks.values()) else {}, packed


def _of_marked(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it has tensors that are neither of rows nor positions: they may have a row for each marked token."""
    if isinstance(value, tuple | list):
        return any(isinstance(one, Tensor) for one in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or name == "position_ids":
        return False
    return value.ndim < 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]


def _cut_marked(marked: Mapping[str, Any], rest: Mapping[str, Any], shards: Shards, rank: int) -> dict[str, Any]:
    """The rows of this rank of tensors with a row for each token that a bool (batch, seq_len) among `rest` marks."""
    if not marked:
        return {}
    marks = [x for x in rest.values() if isinstance(x, Tensor) and x.dtype == torch.bool and x.ndim == 2]
    tensors = [x for value in marked.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    marks = [mark for mark in marks if all(isinstance(x, Tensor) and len(x) == int(mark.sum()) for x in tensors)]
    if len(marks) != 1:
        shapes = {name: [tuple(getattr(x, "shape", ())) for x in each(value)] for name, value in marked.items()}
        raise InputError(
            f"the text decoder of this model is given {shapes}, which are not of its rows and not of tokens that a mask marks: "
            "they cannot be cut over ranks. Run this model in one process, with another attn_implementation"
        )
    rows = resident_positions(shards.layout, rank) if shards.rows else torch.zeros(1, dtype=torch.int64)
    mark, rows = marks[0], rows.to(marks[0].device)
    numbers = torch.zeros(mark.shape, dtype=torch.int64, device=mark.device)
    numbers[mark] = torch.arange(int(mark.sum()), device=mark.device)
    own = numbers[:, rows][mark[:, rows]]
    return {name: mapped(value, lambda x: x.index_select(0, own.to(x.device))) for name, value in marked.items()}


def each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return type(value)(map(function, value)) if isinstance(value, tuple | list) else function(value)
