"""Runs a model on this rank's rows of a batch and returns what one process returns for the whole batch.

    outputs = forward_whole(model, batch, mesh)

A causal language model runs on rows throughout: its loss is reduced over the ranks, and its logits are gathered only if they
are read. Router logits, of which it makes a load-balancing loss, are gathered before it does (`routers`). Of a model with other
towers (vision, audio) the text decoder, head and loss run on rows, see `composite`. Of any other model the decoder
(`base_model`) does; its hidden states are gathered, and every rank runs the head and the loss on the whole sequence. So
rewards, token classes, answers' positions and losses are those of one process, whatever the head does with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.execution.attention import cast_dtype
from ringattn.integrations.transformers import routers
from ringattn.integrations.transformers.attention_interface import NAME, shard_batch
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.compiled import loss_function, outside_graphs
from ringattn.integrations.transformers.composite.loss import rows_to_the_loss
from ringattn.integrations.transformers.composite.run import arguments_of, cut_for_decoder
from ringattn.integrations.transformers.composite.towers import find_towers, text_decoder
from ringattn.integrations.transformers.outputs import GatheredOutputs, ScaledGradient, gathered, is_rows, rows_of
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards
from ringattn.integrations.transformers.seq2seq.decoder_inputs import with_decoder_inputs
from ringattn.integrations.transformers.seq2seq.stacks import place
from ringattn.integrations.transformers.seq2seq.whole import seq2seq_rows_throughout
from ringattn.integrations.transformers.support.rowwise import Probe
from ringattn.integrations.transformers.support.trial import try_model
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
    decoder = text_decoder(inner)
    if decoder is not None:
        find_towers(inner)
    if getattr(inner.config, "is_encoder_decoder", False):
        if inner.get_output_embeddings() is not None:
            outputs = seq2seq_rows_throughout(model, inner, given, group, averaged_over, sharding)
            if outputs is not None:
                return outputs
    elif _is_causal_lm(inner) and not _keeps_some_logits(given) and not _adds_tokens(model):
        if decoder is not None:
            outputs = rows_to_the_loss(model, inner, decoder, given, group, averaged_over, sharding, _size(group))
        else:
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


def _adds_tokens(model: Any) -> bool:
    """Whether PEFT puts tokens before the sequence, which has to be cut after that."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _keeps_some_logits(batch: Mapping[str, Any]) -> bool:
    keep = batch.get("logits_to_keep", 0)
    return isinstance(keep, Tensor) or keep != 0


def _rows_throughout(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> GatheredOutputs | None:
    """None where the model makes a loss of its own of the rows, which is then not that of the whole."""
    items = batch.pop("num_items_in_batch", None)
    own, targets = shard_batch(routers.left_to_the_caller(batch, inner.config), inner.config, group, **sharding)
    own = routers.restored(own, batch)
    shifted = own.pop("shift_labels", None)
    targets = targets if shifted is None else shifted
    shards: Shards = own[NAME]
    shards.check_outputs = False  # the loss of the whole is not a row
    loss = _CausalLoss(targets, group, averaged_over, items)
    balanced = routers.asked_for(batch, inner.config)
    if balanced:  # padding does not count in its load-balancing loss
        own["attention_mask"] = batch.get("attention_mask")
    with (
        loss_function(inner, loss),
        routers.gathering(inner.base_model, shards, averaged_over) if balanced else nullcontext() as balance,
    ):
        outputs = model(**own, return_dict=True) if targets is None else model(**own, labels=targets, return_dict=True)
    if targets is not None and not loss.is_that_of(outputs) and not loss.is_part_of(outputs, inner, balance):
        if items is not None:
            batch["num_items_in_batch"] = items
        return None
    of_whole = ("loss", "aux_loss", routers.LOGITS) if balanced else ("loss",)
    return GatheredOutputs({**outputs, "loss": loss.value} if targets is not None else outputs, shards, averaged_over, of_whole)


class _CausalLoss:
    """Takes the place of a model's loss function: the mean over all ranks, of targets shifted before the cut."""

    def __init__(self, targets: Tensor | None, group: Group | None, averaged_over: int, num_items: Any) -> None:
        self.targets, self.group, self.averaged_over, self.num_items = targets, group, averaged_over, num_items
        self.value: Tensor | None = None
        self.of_tokens: Tensor | None = None  # a copy: models add other losses to `value` in place
        self.version: int | None = None
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if labels is not self.targets or logits.shape[:-1] != labels.shape or kwargs.get("ignore_index", IGNORE) != IGNORE:
            self.value = logits.sum() * float("nan")
            self.calls += 1  # not the loss of these targets
        else:
            value = cross_entropy(logits, labels, self.group, averaged_over=self.averaged_over, num_items=self.num_items)
            self.value, self.of_tokens = value, value.detach().clone()
            self.version = None if torch.compiler.is_compiling() or value.is_inference() else value._version
        return self.value

    def is_that_of(self, outputs: Mapping[str, Any]) -> bool:
        """Whether the model returned this loss as it is, and asked for it once."""
        found: Tensor | None = outputs.get("loss")
        if self.calls != 1 or self.of_tokens is None or found is None:
            return False
        if found is self.value and self.version is not None:
            return bool(found._version == self.version)  # without waiting for a GPU
        return bool(torch.equal(found.detach(), self.of_tokens))

    def is_part_of(self, outputs: Mapping[str, Any], model: Any, balance: routers.Balance | None) -> bool:
        """Whether the model has added to it the load-balancing loss of the whole batch, and nothing else."""
        if self.calls != 1 or self.of_tokens is None or balance is None:
            return False
        found = balance.explains(model, outputs, self.of_tokens)
        if found:
            self.value = outputs["loss"]
        return found


def _head_on_the_whole(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> Any:
    """Hooks cut what the decoder is given and gather what it returns; the head around it sees the whole."""
    composite, size = text_decoder(inner), _size(group)
    base = inner.base_model if composite is None else composite
    cut: list[Shards] = []
    hooks: list[Any] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if isinstance(kwargs.get(NAME), Probe):
            return args, kwargs
        if composite is not None:
            own = cut_for_decoder(module, args, kwargs, group, sharding)
            cut.append(own[NAME])
            return (), own
        given = {name: value for name, value in arguments_of(module, args, kwargs).items() if value is not None}
        if getattr(inner.config, "is_encoder_decoder", False):
            given = dict(with_decoder_inputs(given, inner.config, type(module)))
        own, _ = shard_batch(routers.left_to_the_caller(given, inner.config), inner.config, group, **sharding)
        own = routers.restored(own, given)
        own[NAME].check_outputs = False
        cut.append(own[NAME])
        if isinstance(own[NAME], DecoderShards):
            hooks.extend(place(module, own[NAME]))
        elif not torch.compiler.is_compiling():
            try_model(module, own, own[NAME])
        return (), own | {"return_dict": True}

    def after(module: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        if isinstance(kwargs.get(NAME), Probe):
            return outputs
        if not isinstance(outputs, Mapping):
            raise InputError(f"{type(module).__name__} returned a {type(outputs).__name__}; only a ModelOutput can be gathered")
        whole: Any = outputs
        for name, value in list(outputs.items()):
            whole[name] = _whole(name, value, cut[-1], size)
        return whole

    hooks.append(base.register_forward_pre_hook(outside_graphs(before), with_kwargs=True))
    hooks.append(base.register_forward_hook(outside_graphs(after), with_kwargs=True))
    try:
        outputs = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not cut:
        raise InputError(f"{type(inner).__name__} did not call its {type(base).__name__}, so nothing of it ran on shards")
    return outputs if averaged_over == size else _scaled(outputs, averaged_over / size)


def _whole(name: str, value: Any, shards: Shards, size: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_whole(name, one, shards, size) for one in value)
    of = rows_of(name, shards)
    if not isinstance(value, Tensor) or not value.is_floating_point() or of is None:
        return value
    if name == routers.LOGITS:
        return routers.whole_logits(name, value, shards, size)
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
            outputs[name] = ScaledGradient.apply(value, factor)
    return outputs
