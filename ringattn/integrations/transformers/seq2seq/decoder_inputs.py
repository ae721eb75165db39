"""Makes decoder_input_ids from whole labels before sharding, as the model's own forward does.

They are the labels shifted right by one, and the first on a rank is the last of the rank before it. How they are shifted (mBART
puts the last token first) is not in the config; so the forward of the model's class runs on an instance without weights, up to
the call of its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PretrainedConfig

from ringattn.errors import InputError

DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


def with_decoder_inputs(
    batch: Mapping[str, Any], config: PretrainedConfig, model: type[nn.Module] | None = None
) -> Mapping[str, Any]:
    """Adds the decoder_input_ids that the model's own forward makes from labels, or from input_ids without labels.

    model: the class of the model; by default that of transformers' AutoModelForSeq2SeqLM for this config.
    """
    if any(batch.get(name) is not None for name in DECODER):
        return batch
    kind: Any = model or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    source = next((name for name in ("labels", "input_ids") if batch.get(name) is not None), None)
    ids = None if kind is None or source is None else _shifted(kind, config, {source: batch[source]})
    return batch if ids is None else {**batch, "decoder_input_ids": ids}


class _DecoderCalled(Exception):
    """Carries the input that the forward of a model passes to its decoder."""


class _DecoderStub(nn.Module):
    """Replaces the decoder, and raises its input."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _DecoderCalled(kwargs.get("decoder_input_ids", kwargs.get("input_ids")))


def _shifted(kind: Any, config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder_input_ids that a model without weights makes from its inputs; None if it makes none."""
    model: Any = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = config
    for name in (kind.base_model_prefix, "model", "decoder"):
        if name:
            setattr(model, name, _DecoderStub())
    try:
        model.forward(**inputs, encoder_outputs=(torch.zeros(1, 1, 1),))
    except _DecoderCalled as call:
        ids: Tensor | None = call.args[0]
        return ids
    except ValueError as error:  # of the model, such as for a missing decoder_start_token_id
        raise InputError(f"decoder_input_ids cannot be made from labels: {error}") from error
    except (AttributeError, TypeError):  # another kind of forward
        prepare: Callable[[Tensor], Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        return None if prepare is None or "labels" not in inputs else prepare(inputs["labels"])
    return None
