"""Shards the batch of an encoder-decoder model: two sequences over the same ranks, and three kinds of attention.

Encoder rows attend to encoder rows in both directions, decoder rows to decoder rows causally, and decoder rows to the encoder
rows of all ranks, which is attention whose keys have their own layout. `shard_batch` calls this module when the config has
`is_encoder_decoder`. Decoder inputs are made from labels before sharding, by the model's own forward, since the first input on
a rank is the last label of the rank before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError, PlanError
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers.batch import Shards, padding_of
from ringattn.integrations.transformers.seq2seq.decoder_inputs import DECODER, with_decoder_inputs
from ringattn.nn.collectives import reduction_group
from ringattn.nn.loss import IGNORE
from ringattn.plan.plan import Plan
from ringattn.planner import make_plan
from ringattn.sequence.layout import LAYOUTS, Layout
from ringattn.sequence.mask import causal, full

ENCODER = ("input_ids", "inputs_embeds")
POSITIONS = ("position_ids", "decoder_position_ids")


@dataclass
class DecoderShards(Shards):
    """The shards of the decoder, whose rows most outputs have, of the encoder, and of attention between both.

    cross: layout of the decoder with keys laid out as the encoder; its key_bias is the encoder's padding.
    """

    encoder: Shards = field(kw_only=True)
    cross: Shards = field(kw_only=True)
    ids: tuple[Tensor | None, Tensor | None] = (None, None)  # whole input_ids of encoder and decoder, for positions

    def of(self, name: str) -> Shards:
        """The shards whose rows the output `name` has."""
        return self.encoder if name.startswith("encoder_") else self


def unsupported_seq2seq(batch: Mapping[str, Any], config: PretrainedConfig) -> str | None:
    """The reason why a batch of an encoder-decoder model cannot be sharded, or None. It must hold decoder inputs."""
    source, target = _first_present(batch, ENCODER), _first_present(batch, DECODER)
    if source is None:
        return (
            f"{config.model_type} encodes inputs that ringattn does not shard: the batch has neither input_ids nor "
            "inputs_embeds, only "
            f"{', '.join(batch) or 'nothing'}; encoders of sounds and images, which begin with convolutions, cannot be cut"
        )
    if target is None:
        return (
            "the batch has no decoder_input_ids, and this model makes none from its labels: put them into the batch, whole, as "
            "model.prepare_decoder_input_ids_from_labels(labels) or transformers' DataCollatorForSeq2Seq(model=...) makes them"
        )
    for name in ("encoder_outputs", "past_key_values"):
        if batch.get(name) is not None:
            return f"{name} cannot be cut over ranks; leave it out, and pass the encoder's input_ids"
    if batch.get("use_cache"):
        return "use_cache: a cache cannot be cut over ranks; leave it out"
    for name, value in batch.items():
        if isinstance(value, Tensor) and (problem := _sequence_problem(name, value, source, target)):
            return problem
    return None


def _sequence_problem(name: str, value: Tensor, source: Tensor, target: Tensor) -> str | None:
    """The reason why the tensor `name` belongs to neither sequence, or None."""
    whose, sequence = ("decoder", target) if _of_decoder(name) else ("encoder", source)
    if name in ("attention_mask", "decoder_attention_mask") and value.ndim != 2:
        return (
            f"{name} has shape {tuple(value.shape)}; pass (batch, seq_len), which says what is padding: other masks cannot be "
            "cut over ranks"
        )
    if value.ndim and (value.ndim < 2 or value.shape[:2] != sequence.shape[:2]):
        return (
            f"{name} has shape {tuple(value.shape)} and the {whose}'s sequence {tuple(sequence.shape[:2])}: what a batch holds "
            f"is cut along dim 1; leave {name} out and hand it to the model yourself, on each rank what belongs to its rows"
        )
    if name in POSITIONS and (value != torch.arange(value.shape[1], device=value.device)).any():
        return (
            f"{name} are not 0, 1, 2, ...: packed documents and custom positions are not supported for encoder-decoder models; "
            "leave them out, and pass padding as attention_mask"
        )
    return None


def _of_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "labels"


def _first_present(batch: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    return next((batch[name] for name in names if batch.get(name) is not None), None)


def shard_seq2seq(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None,
    world: int,
    dtype: torch.dtype | None,
    layout: str | Layout,
    choices: dict[str, Any],
) -> tuple[DecoderShards, dict[str, Any], Tensor | None]:
    """`shard_batch` for an encoder-decoder: the shards, this rank's inputs and its targets; raises alike."""
    agreed: dict[str, object] = {}
    problem: str | None = None
    own: Any = None
    try:
        batch = with_decoder_inputs(batch, config)
        problem = unsupported_seq2seq(batch, config)
        if problem is None:
            *own, plan = cut_seq2seq(batch, config, group, world, dtype, layout, choices)
            shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
            agreed = {"shapes": shapes, "plan": plan.digest}
    except (InputError, PlanError) as error:  # possibly of one rank only: raised on all ranks below
        problem = str(error)
    agree(reduction_group(group), {"call": "shard_batch", **agreed}, problem)
    assert own is not None  # else all ranks have raised
    shards, inputs, targets = own
    return shards, inputs, targets


def cut_seq2seq(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None,
    world: int,
    dtype: torch.dtype | None,
    layout: str | Layout,
    choices: dict[str, Any],
) -> tuple[DecoderShards, dict[str, Any], Tensor | None, Plan]:
    """Shards both sequences: the shards, this rank's inputs and targets, and the plan of the decoder's first layer.

    layout: a name, for both sequences; "auto" chooses that of the decoder, and the encoder then has one of the same stride.
    """
    source, target = _first_present(batch, ENCODER), _first_present(batch, DECODER)
    assert source is not None and target is not None  # see `unsupported_seq2seq`
    if isinstance(layout, Layout):
        raise InputError(
            f"layout={layout.name!r} is for one sequence, and there are two; give a name, one of {', '.join(LAYOUTS)}"
        )
    kind = _kind(config, dtype)
    plan = make_plan(target.shape[1], world=world, mask=causal(), layout=layout, **kind, **choices)
    name = "striped" if plan.layout.name == "striped" else "contiguous" if layout == "auto" else layout
    of_source = make_plan(source.shape[1], world=world, mask=full(), layout=name, **kind, **choices).layout
    make = partial(make_plan, world=world, **choices)
    _, rank = group_and_rank(group, world)
    padding = _padding(batch.get("attention_mask"), of_source, rank)
    encoder = Shards(of_source, full(), partial(make, source.shape[1], layout=of_source), group, padding)
    crossing = replace(plan.layout, keys=of_source)
    cross = Shards(crossing, full(), partial(make, target.shape[1], layout=crossing), group, padding)
    shards = DecoderShards(
        plan.layout,
        causal(),
        partial(make, target.shape[1], layout=plan.layout),
        group,
        _padding(batch.get("decoder_attention_mask"), plan.layout, rank),
        encoder=encoder,
        cross=cross,
        ids=(batch.get("input_ids"), batch.get("decoder_input_ids")),
    )
    inputs = {name: _rows(value, shards if _of_decoder(name) else encoder) for name, value in batch.items()}
    inputs = {name: value for name, value in inputs.items() if value is not None and name not in POSITIONS}
    for prefix, sequence in (("", encoder), ("decoder_", shards)):
        mask, ids = inputs.get(f"{prefix}attention_mask"), batch.get(f"{prefix}input_ids")
        if mask is not None or not has_padding(ids, config):  # an explicit mask of ones, so that the model makes none
            ones = torch.ones(len(source), len(own_rows(sequence)), dtype=torch.int64, device=source.device)
            inputs[f"{prefix}attention_mask"] = ones if mask is None else torch.ones_like(mask)
    targets = inputs.pop("labels", None)
    if targets is not None and shards.rows == 0:
        targets = torch.full_like(targets, IGNORE)
    return shards, inputs, targets, plan


def _kind(config: PretrainedConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Heads of the decoder as in the config, for the choice of the layout; layers have their own plans."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return dict(
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype or getattr(config, "dtype", None) or torch.float32,
    )


def _padding(mask: Tensor | None, layout: Layout, rank: int) -> Tensor | None:
    """key_bias (batch, rows) of this rank, or None where no sequence is padded."""
    bias = None if mask is None else padding_of(mask, None)
    return None if bias is None else bias.index_select(1, resident_positions(layout, rank).to(bias.device))


def has_padding(ids: Tensor | None, config: PretrainedConfig) -> bool:
    """Whether whole ids hold padding, which some models mask by themselves where they get no mask."""
    padding = getattr(config, "pad_token_id", None)
    padding = getattr(config.get_text_config(), "pad_token_id", None) if padding is None else padding
    return ids is not None and padding is not None and bool((ids == padding).any())


def own_rows(shards: Shards) -> Tensor:
    """The positions of the rows that the model runs on: those of this rank, or the first row where it has none."""
    rows = resident_positions(shards.layout, group_and_rank(shards.group, shards.layout.world)[1])
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64)


def _rows(value: Any, shards: Shards) -> Any:
    return value.index_select(1, own_rows(shards).to(value.device)) if isinstance(value, Tensor) and value.ndim > 1 else value
