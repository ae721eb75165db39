"""Runs a model on this rank's rows of a batch and returns the outputs of one process for the whole batch.

    outputs = forward_whole(model, batch, mesh)

A causal language model runs entirely on rows: its loss is reduced over the ranks, and its logits are gathered only when they
are read. Router logits, from which it computes a load-balancing loss, are gathered before (`routers`). Of a model with other
towers (vision, audio) the text decoder, head and loss run on rows, see `composite`. Of any other model the decoder
(`base_model`) runs on rows; its hidden states are gathered, and every rank runs the head and the loss on the whole sequence.
Rewards, token classes, answer positions and losses are therefore those of one process, for any head.
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
from ringattn.integrations.transformers.composite.loss import run_head_on_rows
from ringattn.integrations.transformers.composite.run import arguments_of, cut_for_decoder
from ringattn.integrations.transformers.composite.towers import find_towers, text_decoder
from ringattn.integrations.transformers.outputs import GatheredOutputs, ScaledGradient, gather_sequence, is_rows, rows_of
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards
from ringattn.integrations.transformers.seq2seq.decoder_inputs import with_decoder_inputs
from ringattn.integrations.transformers.seq2seq.stacks import hook_stacks
from ringattn.integrations.transformers.seq2seq.whole_batch import run_seq2seq_on_rows
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
    """Computes the outputs of `model(**batch)` as one process would, with attention on shards; collective over `group`.

    Args:
        model: a model of transformers with attn_implementation="ringattn", bare or in DDP, FSDP or PEFT.
        batch: the arguments of the model in one process, the same on every rank of `group`; including labels,
            num_items_in_batch and logits_to_keep.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group by default.
        averaged_over: as in `ringattn.nn.cross_entropy`: 1 where the parameters' gradients are then summed over `group`, its
            size where they are averaged.
        sharding: for `shard_batch`: schedule, layout, topology, dtype...

    Returns:
        A mapping with the attributes of a `ModelOutput`. Every rank of the group has the same values. Of a language model,
        logits and hidden states are gathered when they are read: all ranks must read the same, and each then holds
        (batch, seq_len, vocab_size).

    Raises:
        InputError: the batch or the model cannot be sharded, or the outputs cannot be gathered. Raised on every rank.
    """
    inner = unwrap(model)
    sharding = {"dtype": cast_dtype(next(model.parameters()))} | sharding
    inputs = {name: value for name, value in batch.items() if value is not None}
    decoder = text_decoder(inner)
    if decoder is not None:
        find_towers(inner)
    if getattr(inner.config, "is_encoder_decoder", False):
        if inner.get_output_embeddings() is not None:
            outputs = run_seq2seq_on_rows(model, inner, inputs, group, averaged_over, sharding)
            if outputs is not None:
                return outputs
    elif _is_causal_lm(inner) and not _keeps_subset_of_logits(inputs) and not _adds_tokens(model):
        if decoder is not None:
            outputs = run_head_on_rows(model, inner, decoder, inputs, group, averaged_over, sharding, _size(group))
        else:
            outputs = _run_on_rows(model, inner, inputs, group, averaged_over, sharding)
        if outputs is not None:
            return outputs
    return _run_head_on_whole(model, inner, inputs, group, averaged_over, sharding)


def unwrap(model: Any) -> Any:
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
    """Whether its head is over a vocabulary and its loss function the causal one; `is_loss_of` checks the loss itself."""
    return model.get_output_embeddings() is not None and model.loss_function is ForCausalLMLoss


def _adds_tokens(model: Any) -> bool:
    """Whether PEFT adds tokens before the sequence, which must then be sharded afterwards."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _keeps_subset_of_logits(batch: Mapping[str, Any]) -> bool:
    keep = batch.get("logits_to_keep", 0)
    return isinstance(keep, Tensor) or keep != 0


def _run_on_rows(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> GatheredOutputs | None:
    """Runs the whole model on rows; None where the model computes another loss from the rows."""
    items = batch.pop("num_items_in_batch", None)
    own, targets = shard_batch(routers.without_router_logits(batch, inner.config), inner.config, group, **sharding)
    own = routers.with_router_logits(own, batch)
    shifted = own.pop("shift_labels", None)
    targets = targets if shifted is None else shifted
    shards: Shards = own[NAME]
    shards.check_outputs = False  # the global loss is not a tensor of rows
    loss = _CausalLoss(targets, group, averaged_over, items)
    balanced = routers.wants_router_logits(batch, inner.config)
    if balanced:  # its load-balancing loss excludes padding
        own["attention_mask"] = batch.get("attention_mask")
    with (
        loss_function(inner, loss),
        routers.gathering(inner.base_model, shards, averaged_over) if balanced else nullcontext() as balance,
    ):
        outputs = model(**own, return_dict=True) if targets is None else model(**own, labels=targets, return_dict=True)
    if targets is not None and not loss.is_loss_of(outputs) and not loss.is_part_of_loss(outputs, inner, balance):
        if items is not None:
            batch["num_items_in_batch"] = items
        return None
    of_whole = ("loss", "aux_loss", routers.LOGITS) if balanced else ("loss",)
    return GatheredOutputs({**outputs, "loss": loss.value} if targets is not None else outputs, shards, averaged_over, of_whole)


class _CausalLoss:
    """Replaces a model's loss function: the mean over all ranks, with targets shifted before sharding."""

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

    def is_loss_of(self, outputs: Mapping[str, Any]) -> bool:
        """Whether the model returned this loss unchanged and called it once."""
        loss: Tensor | None = outputs.get("loss")
        if self.calls != 1 or self.of_tokens is None or loss is None:
            return False
        if loss is self.value and self.version is not None:
            return bool(loss._version == self.version)  # without synchronising
        return bool(torch.equal(loss.detach(), self.of_tokens))

    def is_part_of_loss(self, outputs: Mapping[str, Any], model: Any, balance: routers.Balance | None) -> bool:
        """Whether the model returned this loss plus the load-balancing loss of the whole batch, and nothing else."""
        if self.calls != 1 or self.of_tokens is None or balance is None:
            return False
        matches = balance.accounts_for_loss(model, outputs, self.of_tokens)
        if matches:
            self.value = outputs["loss"]
        return matches


def _run_head_on_whole(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> Any:
    """Shards the inputs of the decoder and gathers its outputs by hooks; the head runs on the whole sequence."""
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
        inputs = {name: value for name, value in arguments_of(module, args, kwargs).items() if value is not None}
        if getattr(inner.config, "is_encoder_decoder", False):
            inputs = dict(with_decoder_inputs(inputs, inner.config, type(module)))
        own, _ = shard_batch(routers.without_router_logits(inputs, inner.config), inner.config, group, **sharding)
        own = routers.with_router_logits(own, inputs)
        own[NAME].check_outputs = False
        cut.append(own[NAME])
        if isinstance(own[NAME], DecoderShards):
            hooks.extend(hook_stacks(module, own[NAME]))
        elif not torch.compiler.is_compiling():
            try_model(module, own, own[NAME])
        return (), own | {"return_dict": True}

    def after(module: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        if isinstance(kwargs.get(NAME), Probe):
            return outputs
        if not isinstance(outputs, Mapping):
            raise InputError(f"{type(module).__name__} returned a {type(outputs).__name__}; only a ModelOutput can be gathered")
        gathered_outputs: Any = outputs
        for name, value in list(outputs.items()):
            gathered_outputs[name] = _whole(name, value, cut[-1], size)
        return gathered_outputs

    hooks.append(base.register_forward_pre_hook(outside_graphs(before), with_kwargs=True))
    hooks.append(base.register_forward_hook(outside_graphs(after), with_kwargs=True))
    try:
        outputs = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not cut:
        raise InputError(f"{type(inner).__name__} did not call its {type(base).__name__}, so no part of it ran on shards")
    return outputs if averaged_over == size else _scaled(outputs, averaged_over / size)


def _whole(name: str, value: Any, shards: Shards, size: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_whole(name, item, shards, size) for item in value)
    of = rows_of(name, shards)
    if not isinstance(value, Tensor) or not value.is_floating_point() or of is None:
        return value
    if name == routers.LOGITS:
        return routers.gather_router_logits(name, value, shards, size)
    if not is_rows(value, of):
        raise InputError(
            f"the decoder of this model returned {name} of shape {tuple(value.shape)}, which has no row dimension: it is "
            "pooled over one rank's rows, and its value for the whole sequence is unknown; leave it out of the outputs"
        )
    return gather_sequence(value, of, size)


def _size(group: Group | None) -> int:
    if group is None:
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return group.size()


def _scaled(outputs: Any, factor: float) -> Any:
    """The same outputs, with gradients multiplied by `factor` in backward."""
    for name, value in list(outputs.items()):
        if isinstance(value, Tensor) and value.requires_grad:
            outputs[name] = ScaledGradient.apply(value, factor)
    return outputs
