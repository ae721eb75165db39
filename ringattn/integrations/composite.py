"""Runs a model with towers beside its text (vision, audio) on a whole batch, with its text decoder on this rank's rows.

Embeddings, towers and whatever the model makes of them (positions of images, masks, embeddings merged into the text) are
computed of the whole batch, alike on every rank. What the text decoder is given is cut, and what it returns is rows. In
backward only a rank's part of the embeddings has a gradient: summed over the ranks, parameters of the towers have that of one
process, as those of the decoder have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.comm.group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.integrations.compiled import loss_function
from ringattn.integrations.mask_functions import MaskReading, blocks_of
from ringattn.integrations.rows import OF_OTHER_INPUTS, GatheredOutputs, ScaledGradient, is_rows
from ringattn.integrations.shards import ImageBlocks, Shards
from ringattn.integrations.transformers import NAME, MaskInfo, shard_batch
from ringattn.nn.loss import IGNORE, cross_entropy, shift_labels
from ringattn.sharding import held

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
    if "labels" in given:
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
    own, _ = shard_batch(rest, text, group, **sharding)
    shards: Shards = own[NAME]
    shards.check_outputs = False
    shards.blocks = blocks
    _, rank = group_and_rank(shards.group, shards.layout.world)
    own |= _cut_marked(marked, rest, shards, rank)
    return own | {"return_dict": True}


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
    """What a model's mask for its decoder says: padding, blocks by the window of layers, whether documents are told apart."""
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
        shapes = {name: [tuple(getattr(x, "shape", ())) for x in _listed(value)] for name, value in marked.items()}
        raise InputError(
            f"the text decoder of this model is given {shapes}, which are not of its rows and not of tokens that a mask marks: "
            "they cannot be cut over ranks. Run this model in one process, with another attn_implementation"
        )
    rows = held(shards.layout, rank) if shards.rows else torch.zeros(1, dtype=torch.int64)
    mark, rows = marks[0], rows.to(marks[0].device)
    numbers = torch.zeros(mark.shape, dtype=torch.int64, device=mark.device)
    numbers[mark] = torch.arange(int(mark.sum()), device=mark.device)
    own = numbers[:, rows][mark[:, rows]]
    return {name: _map(value, lambda x: x.index_select(0, own.to(x.device))) for name, value in marked.items()}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return type(value)(map(function, value)) if isinstance(value, tuple | list) else function(value)


def rows_to_the_loss(
    model: nn.Module,
    inner: Any,
    decoder: nn.Module,
    batch: Mapping[str, Any],
    group: Group | None,
    averaged_over: int,
    sharding: Mapping[str, Any],
    size: int,
) -> GatheredOutputs | None:
    """The outputs of a causal language model whose head and loss run on rows, too; None where they may not.

    They may where the head is given what the decoder returns, and the model returns the loss of its logits.
    """
    loss = _LossOfRows(batch.get("labels"), batch.get("attention_mask"), averaged_over)
    with _on_rows(decoder, inner.get_output_embeddings(), loss, group, sharding), loss_function(inner, loss):
        outputs = model(**batch, return_dict=True)
    if not loss.is_that_of(outputs):
        return None
    shards, rows = loss.shards, {}
    assert shards is not None  # else it is not
    of_whole: dict[str, Any] = {}
    for name, value in outputs.items():
        if name == "loss" or value is None:
            continue
        tensors = [x for x in _listed(value) if isinstance(x, Tensor) and x.is_floating_point()]
        if name.startswith(OF_OTHER_INPUTS) or not tensors:
            of_whole[name] = _map(value, lambda x: ScaledGradient.apply(x, averaged_over / size)) if tensors else value
        elif all(is_rows(x, shards) for x in tensors):
            rows[name] = value
        else:
            return None
    if loss.value is not None:
        of_whole["loss"] = loss.value
    return GatheredOutputs(rows | of_whole, shards, averaged_over, of_whole)


class _LossOfRows:
    """Takes the place of a model's loss function, of logits of this rank's rows and labels of the whole batch."""

    def __init__(self, labels: Tensor | None, tokens: Tensor | None, averaged_over: int) -> None:
        self.labels, self.tokens, self.averaged_over = labels, tokens, averaged_over
        self.shards: Shards | None = None
        self.decoded: Tensor | None = None
        self.value: Tensor | None = None
        self.calls = self.decoder_calls = self.head_calls = 0

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        same = labels is self.labels or (self.labels is not None and torch.equal(labels, self.labels))
        shards, known = self.shards, same and kwargs.get("ignore_index", IGNORE) == IGNORE
        if shards is None or not known or logits.ndim != 3 or logits.shape[1] != max(shards.rows, 1):
            self.calls += 1  # not the loss of these rows
            return logits.sum() * float("nan")
        targets = kwargs.get("shift_labels")
        targets = shift_labels(labels, IGNORE) if targets is None else targets
        if self.tokens is not None and self.tokens.shape == targets.shape:  # left padding would be asked for the first token
            targets = targets.masked_fill(self.tokens == 0, IGNORE)
        _, rank = group_and_rank(shards.group, shards.layout.world)
        own = targets.index_select(1, held(shards.layout, rank).to(targets.device)).to(logits.device)
        own = own if shards.rows else torch.full_like(logits[:, :, 0], IGNORE, dtype=torch.int64)
        items = kwargs.get("num_items_in_batch")
        self.value = cross_entropy(logits, own, shards.group, averaged_over=self.averaged_over, num_items=items)
        return self.value

    def is_that_of(self, outputs: Mapping[str, Any]) -> bool:
        """Whether decoder, head and loss ran once each, one behind another, and the model returned that loss as it is."""
        if self.decoder_calls != 1 or self.head_calls != 1:
            return False
        found = outputs.get("loss")
        if self.labels is None:
            return found is None
        if self.calls != 1 or found is None or self.value is None:
            return False
        return found is self.value or bool(torch.equal(found, self.value))


def _is_same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape and x.data_ptr() == other.data_ptr()


@contextmanager
def _on_rows(
    decoder: nn.Module, head: nn.Module, loss: _LossOfRows, group: Group | None, sharding: Mapping[str, Any]
) -> Iterator[None]:
    """Hooks cut what the decoder is given, and look whether the head is given what it returned."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        own = cut_for_decoder(module, args, kwargs, group, sharding)
        loss.shards = own[NAME]
        return (), own

    def after(module: nn.Module, args: Any, outputs: Any) -> None:
        loss.decoder_calls += 1
        loss.decoded = outputs[0]
        loss.head_calls += head in within

    def head_before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if head not in within:
            loss.head_calls += 1 if args and _is_same(args[0], loss.decoded) else 2

    within = set(decoder.modules())
    hooks = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
        head.register_forward_pre_hook(head_before),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
