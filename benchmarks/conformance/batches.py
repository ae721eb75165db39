"""The batches of the sweep: plain, packed, padded on either side, for causal and for encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

LENGTH, SOURCE = 37, 29  # odd, so that no two ranks have alike; SOURCE: of the encoder
DOCUMENTS = (5, 20, 12)
PADDED = 9
IDS = (10, 90)  # no special token of the tiny configurations lies here
IGNORE = -100

# "switched": plain, by set_attn_implementation after the model was made; "recomputed": plain, with gradient checkpointing.
# "numbered": padded left, with the position_ids that generation makes.
CAUSAL = ("plain", "switched", "packed", "padded right", "padded left", "numbered", "recomputed")
SEQ2SEQ = ("plain", "switched", "padded right", "padded left", "recomputed")


def cases_of(config: PretrainedConfig, wanted: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The names of the cases of a model with this configuration, those wanted or all."""
    return tuple(case for case in (SEQ2SEQ if config.is_encoder_decoder else CAUSAL) if wanted is None or case in wanted)


def batch_for(config: PretrainedConfig, case: str) -> dict[str, Any]:
    """What one process gives the model, labels (batch, length) included."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(*IDS, (1 if case == "packed" else 2, LENGTH), generator=source)
    if config.is_encoder_decoder:
        return _translation(ids, case, source)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if case == "packed":
        batch["position_ids"] = torch.cat([torch.arange(n) for n in DOCUMENTS]).unsqueeze(0)
    if case.startswith("padded") or case == "numbered":
        tokens = padding(LENGTH, case)
        batch["attention_mask"] = tokens.long()
        batch["labels"] = ids.masked_fill(~tokens, IGNORE)
        if case != "padded right":
            batch["labels"][0, PADDED] = IGNORE  # else a row of padding would be asked for it
    if case == "numbered":
        batch["position_ids"] = (tokens.long().cumsum(1) - 1).clamp(min=0)
    extended: dict[str, Any] = EXTRA.get(config.model_type, lambda config, batch: batch)(config, batch)
    return extended


def padding(length: int, case: str) -> Tensor:
    """bool (2, length), False where the first sequence is padded."""
    tokens = torch.ones(2, length, dtype=torch.bool)
    tokens[0, slice(length - PADDED, length) if case == "padded right" else slice(0, PADDED)] = False
    return tokens


def _translation(ids: Tensor, case: str, source: torch.Generator) -> dict[str, Any]:
    """Both sides are padded alike; labels stand beside the decoder's inputs, unshifted."""
    first = torch.randint(*IDS, (len(ids), SOURCE), generator=source)
    labels = torch.randint(*IDS, ids.shape, generator=source)
    batch: dict[str, Any] = {"input_ids": first, "decoder_input_ids": ids, "labels": labels}
    if case.startswith("padded"):
        tokens = padding(LENGTH, case)
        batch |= {"attention_mask": padding(SOURCE, case).long(), "decoder_attention_mask": tokens.long()}
        batch["labels"] = labels.masked_fill(~tokens, IGNORE)
    return batch


def _codebooks(config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """A sequence of MusicGen is one row per codebook; its masks have one per sequence. Its own loss wants labels of its own."""
    grown = {name: batch[name].repeat_interleave(config.num_codebooks, 0) for name in ("input_ids", "labels")}
    turned = torch.arange(config.num_codebooks).repeat(len(batch["input_ids"])).unsqueeze(1)
    grown["input_ids"] = (grown["input_ids"] - IDS[0] + 7 * turned) % (IDS[1] - IDS[0]) + IDS[0]
    return batch | grown


def _audio(config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """Voxtral's decoder adds an encoder's output to its inputs, some steps of it for each token."""
    steps = batch["input_ids"].shape[1] * config.downsample_factor
    width = config.audio_config.hidden_size
    features = torch.randn(
        len(batch["input_ids"]), steps, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    return batch | {"encoder_inputs_embeds": features}


def _of_another_model(config: PretrainedConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """An assistant reads hidden states, keys and values of the model it assists."""
    source = torch.Generator().manual_seed(2)
    ids, text = batch["input_ids"], config.get_text_config()
    embeds = torch.randn(*ids.shape, 2 * config.backbone_hidden_size, generator=source, dtype=torch.float64)
    states = {}
    for n, kind in enumerate(text.layer_types[:2]):
        layer = text.per_layer_config[n]
        shape = len(ids), layer.num_key_value_heads, ids.shape[1], layer.head_dim
        k, v = torch.randn(2, *shape, generator=source, dtype=torch.float64)
        states[kind] = (k, v)
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    positions = {"position_ids": torch.arange(ids.shape[1]).unsqueeze(0)}
    return {"inputs_embeds": embeds, "shared_kv_states": states} | positions | rest


EXTRA = {
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "voxtral_realtime": _audio,
    "gemma4_unified_assistant": _of_another_model,
}
