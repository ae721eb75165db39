"""Registers attn_implementation="ringattn" with transformers, and shards batches for models that use it.

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="ringattn")
    inputs, targets = shard_batch(batch, model.config, mesh)         # the usual batch, the same on each rank
    loss = cross_entropy(model(**inputs).logits, targets, mesh)      # of ringattn.nn: the exact mean over all ranks

`inputs` carries a `Shards` through the model's keyword arguments to each layer, so no state is kept between calls and
recomputed layers find the same. The mask interface is registered as well: without it transformers passes no mask on, and
padding would be dropped silently. What shards do not support (generate, dropout, custom masks, layers that carry a state along
the sequence) is refused with a hint. Interfaces: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError, PlanError
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers.batch import Shards, cut, documents_of, padding_of, text_positions, windowed
from ringattn.integrations.transformers.layers import attend, describe_mask
from ringattn.integrations.transformers.outputs import check_models
from ringattn.integrations.transformers.seq2seq.batch import shard_seq2seq
from ringattn.integrations.transformers.support.unsupported import refuse_without_interface, sequence_of, unsupported_batch
from ringattn.nn.collectives import reduction_group
from ringattn.plan.plan import Plan
from ringattn.planner import make_plan
from ringattn.planner.topology import Topology
from ringattn.sequence.layout import Layout
from ringattn.sequence.mask import causal

NAME = "ringattn"


def register(name: str = NAME) -> None:
    """Registers `attn_implementation=name` with transformers, attention and mask. Call it once, before models are made."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, describe_mask)
    check_models()
    refuse_without_interface(name)


def shard_batch(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None = None,
    *,
    schedule: str = "auto",
    layout: str | Layout = "auto",
    topology: Topology | str | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    documents_apart: bool = False,
) -> tuple[dict[str, Any], Tensor | None]:
    """Shards a batch for this rank: the keyword arguments of the model, and the targets of its rows.

    Args:
        batch: the arguments of the model in a single process, the same on every rank of `group`: `input_ids` or `inputs_embeds`
            (batch, seq_len, ...), and optionally `labels` (not shifted), `attention_mask` (batch, seq_len; padding on either
            side), `position_ids` (batch or 1, seq_len; where they restart a packed document begins). Further tensors
            (batch, seq_len, ...) are sharded alike, other values are passed through.
        config: the model's. Its layers must be softmax attention, causal.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group, if there is one, by default.
        schedule: for `make_plan`.
        layout: for `make_plan`.
        topology: for `make_plan`.
        training: for `make_plan`: whether backward counts in the choice.
        dtype: of attention, for the choice of the layout; the model's by default.
        documents_apart: separates packed documents also in a model whose own masks ignore position_ids, which is refused
            otherwise.

    Returns:
        inputs: for `model(**inputs)`; the cache is off, and `ringattn` is a `Shards`.
        targets: int64 (batch, rows), shifted before sharding, for `ringattn.nn.cross_entropy`; None without labels. The model
            gets no labels, since its own loss would be a mean over this rank alone.

    Raises:
        InputError: the batch or the model cannot be sharded; the message has a hint. Raised on every rank.
    """
    check_models()
    process_group = reduction_group(group)
    world = 1 if process_group is None else torch.distributed.get_world_size(process_group)
    _, rank = group_and_rank(group, world)
    agreed: dict[str, object] = {}
    if getattr(config, "is_encoder_decoder", False):
        choices = dict(schedule=schedule, topology=topology, training=training)
        both, inputs, targets = shard_seq2seq(batch, config, group, world, dtype, layout, choices)
        return {**inputs, "use_cache": False, NAME: both}, targets
    problem = unsupported_batch(batch, config)
    shards = None
    if problem is None:
        try:
            choices = dict(schedule=schedule, topology=topology, training=training)
            shards, plan = _shards(batch, config, group, world, dtype, layout, choices)
            shards.packed = bool(shards.mask.bounds) and not documents_apart
            agreed = {"shape": tuple(sequence_of(batch).shape), "plan": plan.digest}
        except (InputError, PlanError) as error:  # possibly of one rank only: raised on all ranks below
            problem = str(error)
    agree(process_group, {"call": "shard_batch", **agreed}, problem)
    assert shards is not None  # else all ranks have raised
    inputs, targets = cut(batch, shards.layout, rank)
    return {**inputs, "use_cache": False, NAME: shards}, targets


def _shards(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None,
    world: int,
    dtype: torch.dtype | None,
    layout: str | Layout,
    choices: dict[str, Any],
) -> tuple[Shards, Plan]:
    """Shards the batch; also returns the plan that determined the layout, that of the model's first kind of layer."""
    text = config.get_text_config()
    tokens = batch.get("attention_mask")
    positions = text_positions(batch.get("position_ids"), tokens)
    bias = None if tokens is None else padding_of(tokens, positions)
    mask = documents_of(positions, tokens is not None) if bias is None and positions is not None else causal()
    layer = first_layer(text)
    heads = layer.num_attention_heads
    make = partial(make_plan, sequence_of(batch).shape[1], world=world, **choices)
    kind: dict[str, Any] = dict(
        heads=heads,
        kv_heads=getattr(layer, "num_key_value_heads", None) or heads,
        head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // heads,
        dtype=dtype or getattr(text, "dtype", None) or torch.float32,
    )
    first, *others = _windows(text)
    plan = make(**kind, mask=windowed(mask, first), layout=layout)
    _, rank = group_and_rank(group, world)
    own = None if bias is None else bias.index_select(1, resident_positions(plan.layout, rank).to(bias.device))
    shards = Shards(plan.layout, mask, partial(make, layout=plan.layout), group, own, assumed=_assumed(batch))
    for window in (first, *others):  # planned before the model runs, since torch.compile would trace the planner
        shards.plan(**kind, window=window)
    return shards, plan


def first_layer(text: PretrainedConfig) -> Any:
    """The config of the first layer where layers differ in heads or head size, as in Gemma 4; else the model's."""
    return text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text


def _assumed(batch: Mapping[str, Any]) -> str | None:
    if batch.get("position_ids") is not None:
        return None
    tokens = batch.get("attention_mask")
    return "counted" if tokens is None or tokens[:, :1].all() else "counted, left padding"


def _windows(text: PretrainedConfig) -> list[int | None]:
    """The window of each kind of layer, the first layer's first; one for all where the config names no kinds (Mistral)."""
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    size = getattr(first_layer(text), "sliding_window", None)
    return list(dict.fromkeys(size if kind == "sliding_attention" else None for kind in kinds))
