"""Runs a model on this rank's rows of a batch and returns what one process returns for the whole batch.

    outputs = forward_whole(model, batch, mesh)

A causal language model runs on rows throughout: its loss is reduced over the ranks, and its logits are gathered only if they
are read. Of any other model the decoder (`base_model`) runs on rows; its hidden states are gathered, and every rank runs the
head and the loss on the whole sequence. So rewards, token classes, answers' positions and losses are those of one process,
whatever the head does with the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ringattn.comm.group import Group
from ringattn.errors import InputError
from ringattn.functional import cast_dtype
from ringattn.integrations.decoder_inputs import with_decoder_inputs
from ringattn.integrations.rows import GatheredOutputs, gathered, is_rows, rows_of
from ringattn.integrations.seq2seq import DecoderShards
from ringattn.integrations.shards import Shards
from ringattn.integrations.stacks import place
from ringattn.integrations.transformers import NAME, shard_batch
from ringattn.integrations.whole_seq2seq import seq2seq_rows_throughout
from ringattn.nn.loss import IGNORE, cross_entropy


def forward_whole(
    model: nn.Module,
    batch: Mapping[str, Any],
    group: Group | None = None,
    *,
    averaged_over: int = 1,
    **sharding: Any,
) -> Any:
    """The outputs of `model(**batch)` as in one process, with attention on shards; collective over `group`.

    Args:
        model: a model of transformers with attn_implementation="ringattn", bare or in DDP, FSDP or PEFT.
        batch: what one process would give the model, the same on every rank of `group`; labels, num_items_in_batch and
            logits_to_keep included.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group by default.
        averaged_over: as in `ringattn.nn.cross_entropy`: 1 where the parameters' gradients are then summed over `group`, its
            size where they are averaged.
        sharding: for `shard_batch`: schedule, layout, topology, dtype...

    Returns:
        A mapping with the attributes of a `ModelOutput`. Every rank of the group has the same values. Of a language model,
        logits and hidden states are gathered when they are read: all ranks must read the same, and each then holds
        (batch, seq_len, vocab_size).

    Raises:
        InputError: the batch or the model cannot be cut, or the model's results cannot be gathered. Raised on every rank.
    """
    inner = bare(model)
    sharding = {"dtype": cast_dtype(next(model.parameters()))} | sharding
    given = {name: value for name, value in batch.items() if value is not None}
    if getattr(inner.config, "is_encoder_decoder", False):
        if inner.get_output_embeddings() is not None:
            outputs = seq2seq_rows_throughout(model, inner, given, group, averaged_over, sharding)
            if outputs is not None:
                return outputs
    elif _is_causal_lm(inner) and not _keeps_some_logits(given):
        outputs = _rows_throughout(model, inner, given, group, averaged_over, sharding)
        if outputs is not None:
            return outputs
    return _head_on_the_whole(model, inner, given, group, averaged_over, sharding)


def bare(model: Any) -> Any:
    """The model of transformers inside DDP, FSDP, torch.compile and PEFT."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "FullyShardedDataParallel":
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _is_causal_lm(model: Any) -> bool:
    """Whether it has one result for each row over a vocabulary; whether its loss is the causal one shows when it runs."""
    return model.get_output_embeddings() is not None and model.loss_function is ForCausalLMLoss


def _keeps_some_logits(batch: Mapping[str, Any]) -> bool:
    keep = batch.get("logits_to_keep", 0)
    return isinstance(keep, Tensor) or keep != 0


def _rows_throughout(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> GatheredOutputs | None:
    """None where the model makes a loss of its own of the rows, which is then not that of the whole."""
    items = batch.pop("num_items_in_batch", None)
    own, targets = shard_batch(batch, inner.config, group, **sharding)
    shifted = own.pop("shift_labels", None)
    targets = targets if shifted is None else shifted
    shards: Shards = own[NAME]
    shards.check_outputs = False  # the loss of the whole is not a row
    loss = _CausalLoss(targets, group, averaged_over, items)
    with _loss_of(inner, loss):
        outputs = model(**own, return_dict=True) if targets is None else model(**own, labels=targets, return_dict=True)
    if targets is not None and not loss.is_that_of(outputs):
        if items is not None:
            batch["num_items_in_batch"] = items
        return None
    return GatheredOutputs(outputs, shards, averaged_over, loss.value)


class _CausalLoss:
    """Takes the place of a model's loss function: the mean over all ranks, of targets shifted before the cut."""

    def __init__(self, targets: Tensor | None, group: Group | None, averaged_over: int, num_items: Any) -> None:
        self.targets, self.group, self.averaged_over, self.num_items = targets, group, averaged_over, num_items
        self.value: Tensor | None = None
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if labels is not self.targets or logits.shape[:-1] != labels.shape or kwargs.get("ignore_index", IGNORE) != IGNORE:
            self.value = logits.sum() * float("nan")
            self.calls += 1  # not the loss of these targets
        else:
            value = cross_entropy(logits, labels, self.group, averaged_over=self.averaged_over, num_items=self.num_items)
            self.value = value
        return self.value

    def is_that_of(self, outputs: Mapping[str, Any]) -> bool:
        """Whether the model returned this loss as it is, and asked for it once."""
        found = outputs.get("loss")
        if self.calls != 1 or self.value is None or found is None:
            return False
        return found is self.value or bool(torch.equal(found.detach(), self.value.detach()))


@contextmanager
def _loss_of(model: Any, loss: _CausalLoss) -> Iterator[None]:
    before = model.loss_function
    model.loss_function = loss
    try:
        yield
    finally:
        model.loss_function = before


def _head_on_the_whole(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> Any:
    """Hooks cut what the decoder is given and gather what it returns; the head around it sees the whole."""
    base, size = inner.base_model, _size(group)
    cut: list[Shards] = []
    hooks: list[Any] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        given = {name: value for name, value in given.items() if value is not None and name not in ("use_cache", "return_dict")}
        if getattr(inner.config, "is_encoder_decoder", False):
            given = dict(with_decoder_inputs(given, inner.config, type(module)))
        own, _ = shard_batch(given, inner.config, group, **sharding)
        own[NAME].check_outputs = False
        cut.append(own[NAME])
        if isinstance(own[NAME], DecoderShards):
            hooks.extend(place(module, own[NAME]))
        return (), own | {"return_dict": True}

    def after(module: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        if not isinstance(outputs, Mapping):
            raise InputError(f"{type(module).__name__} returned a {type(outputs).__name__}; only a ModelOutput can be gathered")
        whole: Any = outputs
        for name, value in list(outputs.items()):
            whole[name] = _whole(name, value, cut[-1], size)
        return whole

    hooks.append(base.register_forward_pre_hook(before, with_kwargs=True))
    hooks.append(base.register_forward_hook(after, with_kwargs=True))
    try:
        outputs = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not cut:
        raise InputError(f"{type(inner).__name__} did not call its {inner.base_model_prefix}, so nothing of it ran on shards")
    return outputs if averaged_over == size else _scaled(outputs, averaged_over / size)


def _whole(name: str, value: Any, shards: Shards, size: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_whole(name, one, shards, size) for one in value)
    of = rows_of(name, shards)
    if not isinstance(value, Tensor) or not value.is_floating_point() or of is None:
        return value
    if not is_rows(value, of):
        raise InputError(
            f"the decoder of this model returned {name} of shape {tuple(value.shape)}, which is not of rows: it is pooled over "
            "one rank's rows, and what it is for the whole sequence is not known; leave it out of the outputs"
        )
    return gathered(value, of, size)


def _size(group: Group | None) -> int:
    if group is None:
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return group.size()


def _scaled(outputs: Any, factor: float) -> Any:
    """The same outputs, whose gradients are multiplied by `factor` on their way back."""
    for name, value in list(outputs.items()):
        if isinstance(value, Tensor) and value.requires_grad:
            outputs[name] = _Scale.apply(value, factor)
    return outputs


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
