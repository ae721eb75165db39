"""Reports why a batch or a model of transformers cannot be sharded over ranks, from its tensors' shapes and its config.

Options that only show when the model runs are checked there: see `layers.attend`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ringattn.errors import InputError

SOFTMAX_ATTENTION = ("full_attention", "sliding_attention")
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
OF_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels")
OF_FLASH_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # repeat the content of position_ids
TABLES_BY_LENGTH = ("dynamic", "longrope")  # rotary tables that depend on the longest position on a rank


def refuse_without_interface(name: str) -> None:
    """Makes models whose layers do not use the attention interface refuse `attn_implementation=name` at construction.

    transformers itself would look the name up in the model's tables, or keep it and never call it. Idempotent.
    """
    choose = PreTrainedModel.get_correct_attn_implementation
    names = getattr(choose, "names_of_ringattn", None)
    if names is not None:
        names.add(name)
        return
    names = {name}

    @wraps(choose)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in names and without_interface(self):
            if not _is_text(self.config):  # another tower keeps its attention
                return choose(self, None, *args, **kwargs)
            raise InputError(
                f"attn_implementation={requested_attention!r}: the layers of {type(self).__name__} do not use transformers' "
                "attention interface, so their attention would stay within each rank's rows. Use another model"
            )
        return choose(self, requested_attention, *args, **kwargs)

    checked.names_of_ringattn = names  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]


def without_interface(model: Any) -> bool:
    """Whether the layers of this model do not use the attention interface: transformers detects it from their source, or looks
    them up in a table of classes. A composite model has no layers itself; its parts are checked separately."""
    cls, config = type(model), model.config
    if _has_text_within(config):
        return False
    if not cls._can_set_attn_implementation() and getattr(cls, "_can_set_attn_implementation_cached_value", None) is False:
        return True
    return any(map(_is_table, vars(sys.modules.get(cls.__module__, object)).values()))


def _is_table(value: object) -> bool:
    """Whether it is a dict of attention classes by the name of their implementation."""
    if not isinstance(value, dict) or "eager" not in value:
        return False
    return all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in value.values())


def _has_text_within(config: PretrainedConfig) -> bool:
    try:
        return config.get_text_config() is not config
    except ValueError:  # several texts
        return True


def _is_text(config: PretrainedConfig) -> bool:
    return hasattr(config, "vocab_size")


def sequence_of(batch: Mapping[str, Any]) -> Tensor:
    """The tensor with a row for each token: input_ids (batch, seq_len) or inputs_embeds (batch, seq_len, hidden)."""
    ids: Tensor = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    return ids


def unsupported_batch(batch: Mapping[str, Any], config: PretrainedConfig) -> str | None:
    """The reason why this batch or this model cannot be sharded, or None."""
    text = config.get_text_config()
    if batch.get("input_ids") is None and batch.get("inputs_embeds") is None:
        return f"the batch has neither input_ids nor inputs_embeds, only {', '.join(batch) or 'nothing'}"
    ids = sequence_of(batch)
    if ids.ndim < 2:
        return f"input_ids has shape {tuple(ids.shape)}; pass (batch, seq_len)"
    if batch.get("past_key_values") is not None or batch.get("use_cache"):
        return (
            "past_key_values, use_cache: a cache cannot be cut over ranks; leave them out (prefix tuning makes one: use LoRA "
            "or prompt tuning)"
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        return (
            f"attention_mask has shape {tuple(mask.shape)}; pass (batch, seq_len), which says what is padding: documents are "
            "given by position_ids, windows by the model's config"
        )
    if problem := _flash_argument_problem(batch):
        return problem
    if text is not config and not config.is_encoder_decoder and (others := _of_other_towers(batch)):
        return (
            f"the batch has {', '.join(others)}, from which a model with other towers computes values of the "
            "whole sequence: call ringattn.integrations.transformers.forward_whole(model, batch, group), or merge images into "
            "inputs_embeds first and leave the rest out"
        )
    for name, value in batch.items():
        if (
            name not in OF_FLASH_ATTENTION
            and isinstance(value, Tensor)
            and value.ndim
            and not _is_of_rows(name, value, ids.shape[1])
        ):
            return (
                f"{name} has shape {tuple(value.shape)} and the sequence {ids.shape[1]} tokens: what a batch holds is cut "
                f"along dim 1; leave {name} out and hand it to the model yourself, on each rank what belongs to its rows"
            )
        if name != "position_ids" and isinstance(value, Tensor) and value.ndim > 1 and len(value) not in (1, len(ids)):
            return (
                f"{name} has shape {tuple(value.shape)} for {len(ids)} sequences in {tuple(ids.shape)}: rows of several "
                "codebooks or choices, each a sequence, are not cut over ranks"
            )
    return unsupported_balance(batch, text) or unsupported_model(text, ids.shape[1])


def _flash_argument_problem(batch: Mapping[str, Any]) -> str | None:
    """The reason why flash attention's arguments contradict position_ids, or None. They are not sharded."""
    ends, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if ends is None:
        return None
    if positions is not None:
        begins = (positions[0, 1:] <= positions[0, :-1]).nonzero().flatten() + 1
        if ends.tolist() == [0, *begins.tolist(), positions.shape[1]]:
            return None
    return (
        f"cu_seq_lens_q is {ends.tolist()}, and documents are given by position_ids, which restart with each: pass "
        "position_ids (batch or 1, seq_len) with the same documents, or leave cu_seq_lens_q and cu_seq_lens_k out"
    )


def unsupported_balance(batch: Mapping[str, Any], text: PretrainedConfig) -> str | None:
    """The reason why the load-balancing loss of this model would not be that of the batch, or None."""
    flag = batch.get("output_router_logits")
    if getattr(text, "output_router_logits", False) if flag is None else flag:
        return (
            "output_router_logits adds a load-balancing loss of this rank's tokens alone, which is not that of the batch: use "
            "ringattn.integrations.transformers.forward_whole(model, batch, group) or ringattn.integrations.trainer, which "
            "gather router logits, or set config.output_router_logits = False"
        )
    return None


def _of_other_towers(batch: Mapping[str, Any]) -> list[str]:
    return [name for name, value in batch.items() if name not in OF_TEXT and _has_tensors(value)]


def _has_tensors(value: Any) -> bool:
    return any(map(_has_tensors, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor) and value.ndim > 0


def _is_of_rows(name: str, value: Tensor, length: int) -> bool:
    return value.ndim > 1 and value.shape[-1 if name == "position_ids" else 1] == length


def unsupported_model(text: PretrainedConfig, length: int) -> str | None:
    """The reason why the model of this text config cannot run on a sharded sequence of `length` tokens, or None."""
    if not hasattr(text, "num_attention_heads"):
        return (
            f"the config of {text.model_type} names no num_attention_heads: it has no attention heads, or models within it do. "
            "What it carries along the sequence would end at each rank's rows"
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - set(SOFTMAX_ATTENTION))
    if kinds:
        return (
            f"this model has layers of type {', '.join(kinds)}, which ringattn does not support on shards: it runs softmax "
            "attention over all or a window of the keys before, and what other layers carry along the sequence would end at "
            "each rank's rows. Use a model without such layers"
        )
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "this model's config asks for attention in both directions; shard_batch is for causal decoders"
    layer_drops = {name: getattr(text, name) for name in LAYER_DROPS if getattr(text, name, 0)}
    if layer_drops:
        return (
            f"config.{' and config.'.join(f'{name}={value}' for name, value in layer_drops.items())} leaves layers out at "
            "random, "
            "different ones on each rank, so that attention would mix layers of different depth; set it to 0"
        )
    return _unsupported_rope(text, length)


def _unsupported_rope(text: PretrainedConfig, length: int) -> str | None:
    """The reason why rotary tables would differ between ranks, or None. Some models have tables by kind of layer."""
    rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    most = getattr(text, "max_position_embeddings", None) or length
    for tables in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        original = tables.get("original_max_position_embeddings") or most
        if tables.get("rope_type") in TABLES_BY_LENGTH and length > original:
            return (
                f"rope_type={tables['rope_type']!r} makes its tables from the longest position it has seen; this batch exceeds "
                f"{original}, "
                "and each rank would see another; use 'yarn', 'linear' or 'llama3'"
            )
    return None
