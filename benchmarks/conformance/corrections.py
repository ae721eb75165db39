"""What the tiny configuration of a model type needs beside the general rules of `tiny`, and why."""

from __future__ import annotations

from typing import Any

# default: arguments of the default configuration, where that without any cannot be made; tiny: fields of the tiny one.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "dbrx": {"tiny": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 2.0}}},  # both are needed, and not there by default
    "deepseek_v2": {"tiny": {"num_experts_per_tok": 2}},  # None by default, as all that follows of experts and layer_types
    "dots1": {"tiny": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}},
    "gpt_neo": {"tiny": {"attention_types": [[["global", "local"], 1]]}},
    "lfm2_moe": {"tiny": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"tiny": {"head_dim": 8}},  # that of the rotated part
    "mamba2": {"tiny": {"num_heads": 8}},  # times head_dim is the inner width
    "nemotron": {"tiny": {"num_key_value_heads": 2}},
    "reformer": {"default": {"is_decoder": True}, "tiny": {"axial_pos_embds": False}},
    "xmod": {"tiny": {"default_language": "en_XX"}},
}

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
CORRECTIONS["cohere_compass_text"] = {"tiny": {"rope_parameters": {"full_attention": SECTIONS}}}

# Without these its full attention layers have an indexer that cannot be made.
INDEXER = {"heads": 4, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 2}
INDEXED = {f"indexer_{name}".replace("indexer_heads", "indexer_n_heads"): size for name, size in INDEXER.items()}
CORRECTIONS["qwen4_exp_text"] = {"tiny": INDEXED}
CORRECTIONS["qwen4_exp"] = {"tiny": {"text_config": INDEXED}}

# Its two tokenizers of sound double their width at each step.
NARROW = {"num_filters": 1, "depths": [1] * 7}
CORRECTIONS["vibevoice_asr"] = {
    "tiny": {f"{kind}_tokenizer_encoder_config": NARROW for kind in ("acoustic", "semantic")}
    | {"acoustic_tokenizer_chunk_size": 3200}
}

# The tied weights of its hybrid layers need two of them; its attention is twice as wide as the rest.
KINDS = ["linear_attention", "hybrid", "hybrid"]
WIDE = {"attention_hidden_size": 128, "attention_head_dim": 32}
CORRECTIONS["zamba"] = {"tiny": {"layers_block_type": KINDS, "num_hidden_layers": len(KINDS)} | WIDE}

# Its upper half takes keys and values from the lower one; full attention has wider heads.
SHARING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
SHARING |= {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}}
CORRECTIONS["gemma4_unified_assistant"] = {"tiny": {"text_config": SHARING}}

# Its third layer is the windowed one, and has sizes of its own.
LATENT = {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CORRECTIONS["dots3_note_text"] = {"tiny": {"per_layer_config": {2: LATENT}}}
CORRECTIONS["dots3_note"] = {"tiny": {"text_config": CORRECTIONS["dots3_note_text"]["tiny"]}}

# What cannot be built here at all, and why.
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm, which is not installed; gemma3n_text is its text model",
    "gemma4_assistant": "transformers refuses every configuration: each layer must share its keys, and one must make them",
}

# Of these, training asks for lengths that are multiples of their chunks.
IN_EVALUATION = ("reformer",)

# The same types otherwise configured, where that changes what attention is: (task, type, fields). BERT and its kin are swept as
# decoders; as they come they attend both ways.
BOTH_WAYS = {"is_decoder": False}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert, both ways": ("causal", "bert", BOTH_WAYS),
    "roberta, both ways": ("causal", "roberta", BOTH_WAYS),
    "roformer, both ways": ("causal", "roformer", BOTH_WAYS),
    "bloom, residual after norm": ("causal", "bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon, alibi": ("causal", "falcon", {"alibi": True}),
    "falcon, new architecture": ("causal", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt, clipped": ("causal", "mpt", {"attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3}}),
    "gpt2, scaled by layer": ("causal", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, upcast": ("causal", "gpt2", {"reorder_and_upcast_attn": True}),
    "gpt_bigcode, many heads": ("causal", "gpt_bigcode", {"multi_query": False}),
    "gpt_neox, in sequence": ("causal", "gpt_neox", {"use_parallel_residual": False}),
    "cohere, norms of q and k": ("causal", "cohere", {"use_qk_norm": True}),
    "deepseek_v3, q at full rank": ("causal", "deepseek_v3", {"q_lora_rank": None}),
    "doge, experts": ("causal", "doge", {"is_moe": True}),
    "gemma, both ways": ("causal", "gemma", {"use_bidirectional_attention": True}),
    "gemma3_text, both ways": ("causal", "gemma3_text", {"use_bidirectional_attention": True}),
    "llama, yarn": ("causal", "llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, dynamic": (
        "causal",
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "mixtral, router losses": ("causal", "mixtral", {"output_router_logits": True}),
    "olmo, clipped": ("causal", "olmo", {"clip_qkv": 1.0}),
    "opt, norms behind": ("causal", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phi, norms of q and k": ("causal", "phi", {"qk_layernorm": True}),
    "qwen2, windows": ("causal", "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "smollm3, windows": ("causal", "smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "stablelm, parallel": ("causal", "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}
