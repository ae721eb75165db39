"""Computes the loss of a model with other towers from the logits of this rank's rows, without logits of the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.comm.process_group import Group, group_and_rank
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers import routers
from ringattn.integrations.transformers.attention_interface import NAME
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.compiled import loss_function, outside_graphs
from ringattn.integrations.transformers.composite.run import as_sequence, cut_for_decoder, map_tensors
from ringattn.integrations.transformers.outputs import OF_OTHER_INPUTS, GatheredOutputs, ScaledGradient, is_rows
from ringattn.integrations.transformers.support.rowwise import Probe
from ringattn.nn.loss import IGNORE, cross_entropy, shift_labels


def run_head_on_rows(
    model: nn.Module,
    inner: Any,
    decoder: nn.Module,
    batch: Mapping[str, Any],
    group: Group | None,
    averaged_over: int,
    sharding: Mapping[str, Any],
    size: int,
) -> GatheredOutputs | None:
    """Runs a causal language model with head and loss on rows; returns its outputs, or None where that is not valid.

    It is valid where the head's input is the decoder's output, and the model returns the loss of its logits.
    """
    if routers.wants_router_logits(batch, inner.config):
        return None
    loss = _LossOfRows(batch.get("labels"), batch.get("attention_mask"), averaged_over)
    with _on_rows(decoder, inner.get_output_embeddings(), loss, group, sharding), loss_function(inner, loss):
        outputs = model(**{**batch, "return_dict": True})
    if not loss.is_loss_of(outputs):
        return None
    shards, rows = loss.shards, {}
    assert shards is not None  # implied by is_loss_of
    of_whole: dict[str, Any] = {}
    for name, value in outputs.items():
        if name == "loss" or value is None:
            continue
        tensors = [x for x in as_sequence(value) if isinstance(x, Tensor) and x.is_floating_point()]
        if name == "logits" or name in loss.decoder_outputs:
            rows[name] = value
            if not all(is_rows(x, shards) for x in tensors):
                return None
        elif name.startswith(OF_OTHER_INPUTS) or not tensors:
            of_whole[name] = map_tensors(value, lambda x: ScaledGradient.apply(x, averaged_over / size)) if tensors else value
        else:
            return None
    if loss.value is not None:
        of_whole["loss"] = loss.value
    return GatheredOutputs(rows | of_whole, shards, averaged_over, of_whole)


class _LossOfRows:
    """Replaces a model's loss function, for logits of this rank's rows and labels of the whole batch."""

    def __init__(self, labels: Tensor | None, tokens: Tensor | None, averaged_over: int) -> None:
        self.labels, self.tokens, self.averaged_over = labels, tokens, averaged_over
        self.shards: Shards | None = None
        self.decoded: Tensor | None = None
        self.decoder_outputs: frozenset[str] = frozenset()
        self.value: Tensor | None = None
        self.of_rows: Tensor | None = None
        self.version: int | None = None
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
        if (
            self.tokens is not None and self.tokens.shape == targets.shape
        ):  # with left padding the first token would be a target of padding
            targets = targets.masked_fill(self.tokens == 0, IGNORE)
        _, rank = group_and_rank(shards.group, shards.layout.world)
        own = targets.index_select(1, resident_positions(shards.layout, rank).to(targets.device)).to(logits.device)
        own = own if shards.rows else torch.full_like(logits[:, :, 0], IGNORE, dtype=torch.int64)
        items = kwargs.get("num_items_in_batch")
        value = cross_entropy(logits, own, shards.group, averaged_over=self.averaged_over, num_items=items)
        self.value, self.of_rows = value, value.detach().clone()
        self.version = None if torch.compiler.is_compiling() or value.is_inference() else value._version
        return value

    def is_loss_of(self, outputs: Mapping[str, Any]) -> bool:
        """Whether decoder, head and loss ran once each, in this order, and the model returned that loss unchanged."""
        if self.decoder_calls != 1 or self.head_calls != 1:
            return False
        returned: Tensor | None = outputs.get("loss")
        if self.labels is None:
            return returned is None
        if self.calls != 1 or returned is None or self.of_rows is None:
            return False
        if returned is self.value and self.version is not None:
            return bool(returned._version == self.version)  # without synchronising; models add other losses in place
        return bool(torch.equal(returned.detach(), self.of_rows))


def _is_same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape and x.data_ptr() == other.data_ptr()


@contextmanager
def _on_rows(
    decoder: nn.Module, head: nn.Module, loss: _LossOfRows, group: Group | None, sharding: Mapping[str, Any]
) -> Iterator[None]:
    """Shards the inputs of the decoder by hooks, and checks that the head's input is the decoder's output."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if isinstance(kwargs.get(NAME), Probe):
            return args, kwargs
        own = cut_for_decoder(module, args, kwargs, group, sharding)
        loss.shards = own[NAME]
        return (), own

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if isinstance(kwargs.get(NAME), Probe):
            return
        loss.decoder_calls += 1
        loss.decoded, loss.decoder_outputs = outputs[0], frozenset(outputs)
        loss.head_calls += head in within

    def head_before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if head not in within:
            loss.head_calls += 1 if args and _is_same(args[0], loss.decoded) else 2

    within = set(decoder.modules())
    hooks = [
        decoder.register_forward_pre_hook(outside_graphs(before), with_kwargs=True),
        decoder.register_forward_hook(outside_graphs(after), with_kwargs=True),
        head.register_forward_pre_hook(outside_graphs(head_before)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
