"""Runs a model with other towers (vision, audio) on a whole batch, with its text decoder on this rank's rows.

Embeddings, towers and what the model computes from them (positions of images, masks, embeddings merged into the text) are
computed for the whole batch, alike on every rank. The inputs of the text decoder are sharded, and its outputs are rows. In
backward only a rank's part of the embeddings has a gradient: summed over ranks, tower and decoder parameters get the gradients
of one process.
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
    """Shards the inputs of a text decoder for this rank, with `Shards`.

    Tensors (batch, seq_len, ...) are sharded along dim 1, positions along the last dim. Tensors with a row for each token that
    a bool (batch, seq_len) marks, such as Qwen3-VL's features of later layers, keep the rows of this rank's tokens.

    Raises:
        InputError: an argument cannot be sharded. Raised on every rank.
    """
    inputs = {name: value for name, value in arguments_of(decoder, args, kwargs).items() if value is not None}
    if inputs.pop("labels", None) is not None and "labels" in inspect.signature(decoder.forward).parameters:
        raise InputError(f"{type(decoder).__name__}, the text decoder, is given labels and computes a loss of its rows alone")
    cache = inputs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length():
        raise InputError("past_key_values: a cache cannot be cut over ranks; leave it out")
    tokens, blocks, packed = _read_masks(inputs.pop("attention_mask", None), decoder)
    if packed and inputs.get("position_ids") is None:
        raise InputError(f"a model separates documents by positions that it does not pass to {type(decoder).__name__}")
    if tokens is not None:
        inputs["attention_mask"] = tokens
    shape = tuple(_sequence(inputs).shape[:2])
    marked = {name: value for name, value in inputs.items() if name != "attention_mask" and _may_be_marked(name, value, shape)}
    row_inputs = {name: value for name, value in inputs.items() if name not in marked}
    text = copy(decoder.config.get_text_config())  # type: ignore[union-attr, operator]
    if blocks and all(blocks.values()) and getattr(text, "use_bidirectional_attention", None) is True:
        text.use_bidirectional_attention = False  # in PaliGemma this refers to the blocks of its masks
    own, _ = shard_batch(routers.without_router_logits(row_inputs, text), text, group, **sharding)
    own = routers.with_router_logits(own, row_inputs)
    shards: Shards = own[NAME]
    shards.check_outputs = False
    shards.blocks = blocks
    _, rank = group_and_rank(shards.group, shards.layout.world)
    own |= _cut_marked(marked, row_inputs, shards, rank) | {"return_dict": True}
    if not torch.compiler.is_compiling():
        try_model(decoder, own, shards)
    return own


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    inputs = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(name, {})
    return {name: value for name, value in inputs.items() if name not in LEFT_OUT}


def _sequence(inputs: Mapping[str, Any]) -> Tensor:
    sequence = inputs.get("inputs_embeds", inputs.get("input_ids"))
    if not isinstance(sequence, Tensor) or sequence.ndim < 2:
        raise InputError(f"a text decoder is given neither inputs_embeds nor input_ids, only {', '.join(inputs)}")
    return sequence


def _read_masks(mask: Any, decoder: nn.Module) -> tuple[Tensor | None, dict[int | None, ImageBlocks | None], bool]:
    """Reads a model's mask for its decoder: padding, blocks by the window of layers, whether documents are separated."""
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


def _may_be_marked(name: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it holds tensors that are neither of rows nor positions and may have a row for each marked token."""
    if isinstance(value, tuple | list):
        return any(isinstance(item, Tensor) for item in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or name == "position_ids":
        return False
    return value.ndim < 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]


def _cut_marked(marked: Mapping[str, Any], row_inputs: Mapping[str, Any], shards: Shards, rank: int) -> dict[str, Any]:
    """The rows of this rank of tensors with a row for each token that a bool (batch, seq_len) among `row_inputs` marks."""
    if not marked:
        return {}
    marks = [x for x in row_inputs.values() if isinstance(x, Tensor) and x.dtype == torch.bool and x.ndim == 2]
    tensors = [x for value in marked.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    marks = [mark for mark in marks if all(isinstance(x, Tensor) and len(x) == int(mark.sum()) for x in tensors)]
    if len(marks) != 1:
        shapes = {name: [tuple(getattr(x, "shape", ())) for x in as_sequence(value)] for name, value in marked.items()}
        raise InputError(
            f"the text decoder of this model is given {shapes}, which are not of its rows and not of tokens that a mask marks: "
            "they cannot be cut over ranks. Run this model in one process, with another attn_implementation"
        )
    rows = resident_positions(shards.layout, rank) if shards.rows else torch.zeros(1, dtype=torch.int64)
    mark, rows = marks[0], rows.to(marks[0].device)
    numbers = torch.zeros(mark.shape, dtype=torch.int64, device=mark.device)
    numbers[mark] = torch.arange(int(mark.sum()), device=mark.device)
    own = numbers[:, rows][mark[:, rows]]
    return {name: map_tensors(value, lambda x: x.index_select(0, own.to(x.device))) for name, value in marked.items()}


def as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return type(value)(map(function, value)) if isinstance(value, tuple | list) else function(value)
