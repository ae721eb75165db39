"""Makes decoder_input_ids of whole labels before they are cut, as a model's own forward does.

They are the labels, one to the right, and what comes first on a rank is the last of the rank before it. How they are shifted
(mBART puts the last token first) is not in the config; so the forward of the model's class is run on an instance without any
weights, up to where it calls its decoder.
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
    """The batch with the decoder_input_ids that the model's own forward makes of labels, or of input_ids, if it has none.

    model: the class of the model; by default that of transformers' AutoModelForSeq2SeqLM for this config.
    """
    if any(batch.get(name) is not None for name in DECODER):
        return batch
    kind: Any = model or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    made_of = next((name for name in ("labels", "input_ids") if batch.get(name) is not None), None)
    ids = None if kind is None or made_of is None else _shifted(kind, config, {made_of: batch[made_of]})
    return batch if ids is None else {**batch, "decoder_input_ids": ids}


class _GivenToDecoder(Exception):
    """Carries what the forward of a model gives its decoder."""


class _Catch(nn.Module):
    """Stands where the model has its decoder, and gives back what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _GivenToDecoder(kwargs.get("decoder_input_ids", kwargs.get("input_ids")))


def _shifted(kind: Any, config: PretrainedConfig, given: Mapping[str, Tensor]) -> Tensor | None:
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
