"""What the tiny configuration of a model type needs beside the general rules of `tiny`, and why."""

from __future__ import annotations

from typing import Any

# default: arguments of the default configuration, where that without any cannot be made; tiny: fields of the tiny one.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"tiny": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}}},
    "dbrx": {"tiny": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 2.0}}},  # both are needed, and not there by default
    "deepseek_v2": {"tiny": {"num_experts_per_tok": 2}},
    "dots1": {"tiny": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}},  # None by default
    "gpt_neo": {"tiny": {"attention_types": [[["global", "local"], 1]]}},
    "lfm2_moe": {"tiny": {"layer_types": ["conv", "full_attention"]}},  # None by default
    "mamba2": {"tiny": {"num_heads": 8}},  # times head_dim is the inner width
    "longcat_flash": {"tiny": {"head_dim": 8}},  # that of the rotated part
    "nemotron": {"tiny": {"num_key_value_heads": 2}},
    "qwen4_exp_text": {"tiny": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}},
    "reformer": {"default": {"is_decoder": True}, "tiny": {"axial_pos_embds": False}},
    "vibevoice_asr": {"tiny": {"acoustic_tokenizer_chunk_size": 3200, "acoustic_tokenizer_encoder_config": {"num_filters": 1, "depths": [1] * 7}, "semantic_tokenizer_encoder_config": {"num_filters": 1, "depths": [1] * 7}}},
    "xmod": {"tiny": {"default_language": "en_XX"}},
    "zamba": {"tiny": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 128, "attention_head_dim": 32}},
}
SHARING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
SHARING |= {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}}
CORRECTIONS["gemma4_unified_assistant"] = {"tiny": {"text_config": SHARING}}
LATENT = {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CORRECTIONS["dots3_note_text"] = {"tiny": {"per_layer_config": {2: LATENT}}}  # its third layer is the windowed one
CORRECTIONS["dots3_note"] = {"tiny": {"text_config": CORRECTIONS["dots3_note_text"]["tiny"]}}
CORRECTIONS["qwen4_exp"] = {"tiny": {"text_config": CORRECTIONS["qwen4_exp_text"]["tiny"]}}

# What cannot be built here at all, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm, which is not installed; gemma3n_text is its text model",
    "gemma4_assistant": "transformers refuses every configuration: each layer must share its keys, and one must make them",
}
