"""Makes a tiny configuration of any model type of transformers, from its default one, by the names of its fields.

Each number is shrunk by what its name says it is (a width, a count of heads, a window ...), alike in the configuration and in
those it is composed of, so that what must agree still does. Of the layers one of each kind is kept. Types for which that is not
enough are corrected by `corrections.CORRECTIONS`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from conformance.corrections import CORRECTIONS

VOCABULARY = 128
SPECIAL = 100  # ids from here on may mean an image or the like; the sweep's batches draw from below
LAYERS = (2, 4)  # at least and at most

# The first pattern that matches a whole name gives the size. Nothing is ever made larger than it was.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(num_mel_bins|num_channels|.*kernel_size|.*kernel_dim|image_size|patch_size|.*_coef)", 0),  # 0: left as it is
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCABULARY),
    (r".*max.*position.*|n_positions|n_ctx|max_seq_len|model_max_length|num_position_embeddings", 64),
    (r"relative_attention_max_distance|relative_max_distance|position_bias_max_distance", 20),
    (r".*kv_heads|.*key_value_heads|kv_n_heads|.*num_key_heads", 2),
    (r".*attention_heads|n_heads?|num_heads|.*num_value_heads|.*linear_num_heads|index_n_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|n_groups?|num_expert_group|mamba_n_groups", 2),
    (r"topk_group|num_kv_shared_layers|first_k_dense_replace|num_dense_layers", 1),
    (r"attn_layer_offset|moe_layer_start_index|prefix_dense_.*", 1),
    (r".*_period|.*_sparse_step|.*_frequency|.*layer_interval|interleave_.*_step", 2),
    (r"layer_group_size|.*_every_n_layers|.*sliding_window_pattern|n_layers_per_attn_res_block", 2),
    (r"num(_\w+)*_layers|num_layers_per_stack|n_layers?|\w+_layers|layers|num_blocks|depth|max_window_layers", 2),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),  # the rotated part and the other, as below
    (r".*head_dim|.*d_kv|dim_head|kv_channels|mamba_d_head", 16),
    (r".*_rank|hc_lowrank|d_rel", 16),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|d_ff|dff|dim_ff|n_inner|mlp_dim|mamba_d_ssm", 64),
    (r".*hidden_size.*|.*d_model|n_embd|.*hidden_dim|embedding_size|emb_dim", 64),
    (r"ple_embed_dim|.*output_dim|.*out_dim|.*_in_dim|.*input_size", 64),
    (r".*sliding_window(_size)?|attention_chunk_size|local_attention|local_attention_window_len", 8),
    (r"window_size|rel_extent|index_topk|keep_window_size|attention_window|local_radius|context_size|max_pos_emb", 8),
    (r".*block_size|.*chunk_size|.*state_size|mamba_d_state|local_attn_chunk_length|lsh_attn_chunk_length", 8),
)


def tiny_config(model_type: str, decoder: bool = True, more: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A configuration with a few layers of width 64, without dropout.

    Args:
        decoder: whether a type that may be one, as BERT, is a causal decoder.
        more: fields that shall be otherwise.

    Raises whatever the configuration's class raises.
    """
    cls = CONFIG_MAPPING[model_type]
    correction = CORRECTIONS.get(model_type, {})
    default = correction.get("default", {})
    tiny = {name: value for name, value in default.items() if not isinstance(value, Mapping)} | correction.get("tiny", {})
    config = cls(**default)
    if decoder and "is_decoder" in fields_of(config) and not config.is_encoder_decoder:
        tiny["is_decoder"] = True
    return shrunk(config, tiny | dict(more or {}))


def shrunk(config: PretrainedConfig, corrections: Mapping[str, Any]) -> PretrainedConfig:
    """`config` made tiny. corrections: fields that get this value instead; a mapping for a configuration inside."""
    fields = fields_of(config)
    wanted = all_smaller(fields) | kept_layers(config)
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            wanted[name] = shrunk(value, corrections.get(name, {}))
    wanted |= {name: value for name, value in corrections.items() if not isinstance(fields.get(name), PretrainedConfig)}
    usual = {} if corrections else fields_of(type(config)())
    return type(config)(**{name: value for name, value in wanted.items() if not same(value, usual.get(name, KeyError))})


def same(value: Any, usual: Any) -> bool:
    """Whether a constructor makes this value by itself; configurations inside are always given."""
    return not isinstance(value, PretrainedConfig) and bool(value == usual)


def fields_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration's constructor takes, as it stands in `config`."""
    stored = {name: type(config).attribute_map.get(name, name) for name in accepted(type(config))}
    return {name: vars(config)[real] for name, real in stored.items() if real in vars(config)}


def grouped(fields: Mapping[str, Any]) -> dict[str, str]:
    """For each count of key/value heads the count of heads it belongs to: where they were equal they stay so."""
    pairs = [("num_key_value_heads", "num_attention_heads"), ("num_kv_heads", "num_attention_heads")]
    pairs += [("swa_num_key_value_heads", "swa_num_attention_heads"), ("linear_num_key_heads", "linear_num_value_heads")]
    return {kv: heads for kv, heads in pairs if kv in fields and heads in fields}


def accepted(cls: type) -> set[str]:
    """The names that a configuration's constructor takes."""
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls) if field.init} - {"transformers_version", "dtype"}
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]  # cls is no instance


def all_smaller(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of these fields made small; where key/value heads were as many as heads, they still are."""
    small = {name: smaller(name, value) for name, value in fields.items()}
    return small | {name: small[heads] for name, heads in grouped(fields).items() if fields[name] == fields[heads]}


def smaller(name: str, value: Any) -> Any:
    """The value of one field, made small by what its name says."""
    if re.fullmatch(r".*(drop|jitter).*", name) and isinstance(value, int | float) and not isinstance(value, bool):
        return type(value)(0)
    if re.fullmatch(r".*_token_(id|index)|.*_(id|index)", name):
        return token(name, value)
    if name == "head_dim" and value is None:
        return 16
    if isinstance(value, int) and not isinstance(value, bool):
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name):
                return min(value, size) if size else value
    if name == "rope_parameters" and isinstance(value, Mapping):
        return rope(value)
    return value


def token(name: str, value: Any) -> Any:
    """A special token's id within the small vocabulary, apart from the ids that batches draw from."""
    common = {"pad": 0, "bos": 1, "eos": 2}
    if isinstance(value, list):
        return [token(name, entry) for entry in value][:1]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.split("_")[0] in common and name.endswith("_token_id") and name.count("_") == 2:
        return common[name.split("_")[0]]
    return value if value < 8 else SPECIAL + sum(name.encode()) % (VOCABULARY - SPECIAL)


def rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary tables of which the changes with length still show on a short sequence."""
    small = {key: rope(value) if isinstance(value, Mapping) else value for key, value in parameters.items()}
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = 48  # below the 64 positions, above the lengths of the sweep
    if small.get("mrope_section"):
        small["mrope_section"] = [4, 2, 2]
    return small


def kept_layers(config: PretrainedConfig) -> dict[str, Any]:
    """The number of layers, and what stands in lists with an entry per layer, when one layer of each kind is kept."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 2:
        return {}
    fields = fields_of(config)
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple) and len(value) == count}
    own = {int(n): dict(more) for n, more in (config.to_dict().get("per_layer_config") or {}).items()}
    if not lists:
        return {}
    kinds = [repr([value[n] for value in lists.values()]) for n in range(count)]
    chosen = [n for n, kind in enumerate(kinds) if kinds.index(kind) == n][: LAYERS[1]]
    chosen += [n for n in range(count) if n not in chosen][: max(0, LAYERS[0] - len(chosen))]
    chosen.sort()
    kept: dict[str, Any] = {name: [per_layer(name, value[n]) for n in chosen] for name, value in lists.items()}
    if own:
        kept["per_layer_config"] = {
            new: {name: 2 * value if name == "head_dim" else value for name, value in all_smaller(own[old]).items()}
            for new, old in enumerate(chosen)
            if old in own
        }
    real = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return kept | {name: len(chosen) for name in (real, "num_hidden_layers") if name in fields}


def per_layer(name: str, value: Any) -> Any:
    """An entry of a list with one per layer, made small as a field of that name without the plural would be."""
    return smaller(re.sub(r"_per_layer$|s$", "", name), value)
