"""Tiny vision-language models of several families, and a batch with images for each: two sequences, images in other places."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, START, END, VIDEO = 90, 91, 92, 93
LENGTH = 37
TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.0,
)
LLAMA = {"model_type": "llama"} | TEXT
MROPE = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
WINDOWED = TEXT | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
SEES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 8} | SEES
QWEN = dict(depth=2, hidden_size=16, num_heads=2, patch_size=2, spatial_merge_size=2, temporal_patch_size=2)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)

# model type: text config, vision config, further arguments, tokens of an image
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "llava": (LLAMA, {"model_type": "clip_vision_model", "image_size": 8} | SEES, {"image_token_index": IMAGE}, 4),
    "qwen2_vl": (MROPE, QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, IDS, 4),
    "qwen2_5_vl": (
        MROPE,
        QWEN | dict(intermediate_size=24, out_hidden_size=32, window_size=8, fullatt_block_indexes=[1]),
        IDS,
        4,
    ),
    "qwen3_vl": (
        MROPE,
        QWEN | dict(intermediate_size=24, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        IDS,
        4,
    ),
    "glm4v": (
        MROPE | {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        QWEN | dict(intermediate_size=24, out_hidden_size=32, image_size=8),
        dict(
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=94,
            video_end_token_id=95,
        ),
        4,
    ),
    "gemma3": (
        {"model_type": "gemma3_text"} | WINDOWED | {"sliding_window": 3},  # which cuts its images, of 4 tokens
        SIGLIP | {"vision_use_head": False},
        {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 4},
        4,
    ),
    "paligemma": (
        {"model_type": "gemma"} | TEXT,
        SIGLIP | {"vision_use_head": False, "projection_dim": 32},
        {"image_token_index": IMAGE, "vocab_size": 97, "projection_dim": 32, "hidden_size": 32},
        4,
    ),
    "paligemma of gemma2": (
        {"model_type": "gemma2"} | WINDOWED | {"attn_logit_softcapping": None},
        SIGLIP | {"vision_use_head": False, "projection_dim": 32},
        {"image_token_index": IMAGE, "vocab_size": 97, "projection_dim": 32, "hidden_size": 32},
        4,
    ),
    "idefics3": (LLAMA, SEES | {"image_size": 8}, {"image_token_id": IMAGE, "scale_factor": 1}, 4),
    "internvl": (
        {"model_type": "qwen2"} | TEXT,
        SEES | {"image_size": [16, 16], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "image_seq_length": 4},
        4,
    ),
    "mllama": (
        TEXT
        | {
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "model_type": "mllama_text_model",
        },
        dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            patch_size=4,
            image_size=8,
            vision_output_dim=32,
            intermediate_layers_indices=[0],
            max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]],
        ),
        {"image_token_index": IMAGE},
        1,
    ),
}


def model_of(name: str, **more: Any) -> Any:
    text, vision, rest, _ = FAMILIES[name]
    config = AutoConfig.for_model(name.split()[0], text_config=dict(text), vision_config=dict(vision), **rest, **more)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():  # their own initialisation leaves some without effect
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(name: str, kind: str = "plain") -> dict[str, Tensor]:
    """Three images in two sequences, at other places in each."""
    source, count = torch.Generator().manual_seed(1), FAMILIES[name][3]
    ids = torch.randint(3, 80, (2, LENGTH), generator=source)
    for sequence, place in ((0, 5), (0, 20), (1, 12)):
        ids[sequence, place - 1], ids[sequence, place + count] = START, END
        ids[sequence, place : place + count] = IMAGE
    observed = ids == IMAGE
    batch = {"input_ids": ids, "labels": ids.masked_fill(observed, -100)}
    if name.startswith(("qwen", "glm4v")):
        patches = 3 * 4 * count
        batch["pixel_values"] = torch.randn(patches, 3 * 2 * 2 * 2, generator=source).double()
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 3)
        batch["mm_token_type_ids"] = observed.int()
    elif name == "idefics3":
        batch["pixel_values"] = torch.randn(2, 2, 3, 8, 8, generator=source).double()
        batch["pixel_values"][1, 1] = 0  # no image: the model leaves it out
        batch["pixel_attention_mask"] = torch.ones(2, 2, 8, 8).bool()
        batch["pixel_attention_mask"][0, 1, :, 4:] = False  # a narrow image
    elif name == "mllama":
        batch["pixel_values"] = torch.randn(2, 1, 1, 3, 8, 8, generator=source).double()
        batch |= {"aspect_ratio_ids": torch.ones(2, 1).long(), "aspect_ratio_mask": torch.ones(2, 1, 1).long()}
        batch["cross_attention_mask"] = torch.ones(2, LENGTH, 1, 1).long()
    else:
        size = 16 if name == "internvl" else 8
        batch["pixel_values"] = torch.randn(3, 3, size, size, generator=source).double()
    if name == "gemma3":
        batch["token_type_ids"] = observed.long()
    if name.startswith("paligemma"):  # a prefix seen both ways, then causal text
        batch["token_type_ids"] = (torch.arange(LENGTH)[None] >= torch.tensor([[26], [18]])).long()
    if kind == "padded":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, -2:] = 0  # fewer than a window: one process makes NaN of a row without keys
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch
