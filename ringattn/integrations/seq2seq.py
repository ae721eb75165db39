"""Encoder-decoder models on shards: two sequences cut over the same ranks, and three kinds of attention between them.

Encoder rows attend to encoder rows both ways, decoder rows to decoder rows causally, and decoder rows to the encoder's rows of
all ranks, which is attention whose keys have a layout of their own. `shard_batch` comes here when the config says
`is_encoder_decoder`. Decoder inputs are made of labels before the cut, by the model's own forward, since what comes first on a
rank is the last of the rank before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PretrainedConfig

from ringattn.comm.group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.integrations.shards import Shards, padding_of
from ringattn.layout import LAYOUTS, Layout
from ringattn.mask import causal, full
from ringattn.nn.loss import IGNORE
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.sharding import held

ENCODER, DECODER = ("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds")
POSITIONS = ("position_ids", "decoder_position_ids")


@dataclass
class DecoderShards(Shards):
    """The decoder's sequence, as what the model returns is of its rows; and the encoder's, and attention between both.

    cross: layout of the decoder with keys laid out as the encoder; its key_bias is the encoder's padding.
    """

    encoder: Shards = field(kw_only=True)
    cross: Shards = field(kw_only=True)
    ids: tuple[Tensor | None, Tensor | None] = (None, None)  # whole input_ids of encoder and decoder: positions hang on them

    def of(self, name: str) -> Shards:
        """Those that a result of the model called `name` is rows of."""
        return self.encoder if name.startswith("encoder_") else self


def unsupported_seq2seq(batch: Mapping[str, Any], config: PretrainedConfig) -> str | None:
    """Why this batch of an encoder-decoder model cannot be cut over ranks, or None. Decoder inputs must be in it."""
    source, target = _one(batch, ENCODER), _one(batch, DECODER)
    if source is None:
        return (
            f"{config.model_type} encodes what ringattn does not cut: the batch has neither input_ids nor inputs_embeds, only "
            f"{', '.join(batch) or 'nothing'}; encoders of sounds and images, which begin with convolutions, cannot be cut"
        )
    if target is None:
        return (
            "the batch has no decoder_input_ids, and this model makes none of its labels: put them into the batch, whole, as "
            "model.prepare_decoder_input_ids_from_labels(labels) or transformers' DataCollatorForSeq2Seq(model=...) makes them"
        )
    for name in ("encoder_outputs", "past_key_values"):
        if batch.get(name) is not None:
            return f"{name} cannot be cut over ranks; leave it out, and pass the encoder's input_ids"
    if batch.get("use_cache"):
        return "use_cache: a cache cannot be cut over ranks; leave it out"
    for name, value in batch.items():
        if isinstance(value, Tensor) and (problem := _unlike_sequence(name, value, source, target)):
            return problem
    return None


def _unlike_sequence(name: str, value: Tensor, source: Tensor, target: Tensor) -> str | None:
    """Why the tensor `name` is neither of the encoder's nor of the decoder's sequence, or None."""
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
            f"{name} are not 0, 1, 2, ...: packed documents and positions of one's own are not cut for encoder-decoder models; "
            "leave them out, and pass padding as attention_mask"
        )
    return None


def _of_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "labels"


def _one(batch: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    return next((batch[name] for name in names if batch.get(name) is not None), None)


def cut_seq2seq(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None,
    world: int,
    dtype: torch.dtype | None,
    layout: str | Layout,
    choices: dict[str, Any],
) -> tuple[DecoderShards, dict[str, Any], Tensor | None, Plan]:
    """What attention knows, this rank's inputs and targets, and the plan of the decoder's first layer.

    layout: a name, for both sequences; "auto" chooses that of the decoder, and the encoder then has one of the same stride.
    """
    source, target = _one(batch, ENCODER), _one(batch, DECODER)
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
    for mask in ("attention_mask", "decoder_attention_mask"):  # given, so that the model makes none of its own; all is there
        if mask in inputs:
            inputs[mask] = torch.ones_like(inputs[mask])
    targets = inputs.pop("labels", None)
    if targets is not None and shards.rows == 0:
        targets = torch.full_like(targets, IGNORE)
    return shards, inputs, targets, plan


def _kind(config: PretrainedConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Heads of the decoder, as far as the config tells them: for the choice of the layout, layers say their own."""
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
    return None if bias is None else bias.index_select(1, held(layout, rank).to(bias.device))


def own_rows(shards: Shards) -> Tensor:
    """The positions of the rows that the model runs on: those of this rank, or the first one where it has none."""
    rows = held(shards.layout, group_and_rank(shards.group, shards.layout.world)[1])
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64)


def _rows(value: Any, shards: Shards) -> Any:
    return value.index_select(1, own_rows(shards).to(value.device)) if isinstance(value, Tensor) and value.ndim > 1 else value


def with_decoder_inputs(
    batch: Mapping[str, Any], config: PretrainedConfig, model: type[nn.Module] | None = None
) -> Mapping[str, Any]:
    """The batch with the decoder_input_ids that the model's own forward makes of labels, or of input_ids, if it has none.

    model: the class of the model; by default that of transformers' AutoModelForSeq2SeqLM for this config.
    """
    if _one(batch, DECODER) is not None:
        return batch
    kind = model or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    made_of = next((name for name in ("labels", "input_ids") if batch.get(name) is not None), None)
    ids = None if kind is None or made_of is None else _shifted(kind, config, {made_of: batch[made_of]})
    return batch if ids is None else {**batch, "decoder_input_ids": ids}


class _GivenToDecoder(Exception):
    """Carries what the forward of a model gives its decoder."""


class _Catch(nn.Module):
    """Stands where the model has its decoder, and gives back what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _GivenToDecoder(kwargs.get("decoder_input_ids", kwargs.get("input_ids")))


def _shifted(kind: type[nn.Module], config: PretrainedConfig, given: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder_input_ids that a model without any weights makes of what it is given; None if it makes none."""
    model: Any = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = config
    for name in (kind.base_model_prefix, "model", "decoder"):
        if name:
            setattr(model, name, _Catch())
    try:
        model.forward(**given, encoder_outputs=(torch.zeros(1, 1, 1),))
    except _GivenToDecoder as caught:
        ids: Tensor | None = caught.args[0]
        return ids
    except ValueError as error:  # of the model's own about its config, as for a missing decoder_start_token_id
        raise InputError(f"decoder_input_ids cannot be made of labels: {error}") from error
    except (AttributeError, TypeError):  # another kind of forward
        prepare: Callable[[Tensor], Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        return None if prepare is None or "labels" not in given else prepare(given["labels"])
    return None
