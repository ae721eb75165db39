"""Trains a vision-language model on two ranks.

torchrun --standalone --nproc-per-node 2 docs/examples/hf_images.py
"""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import ringattn
from ringattn.integrations.transformers import forward_whole, register
from ringattn.nn import reduce_gradients

mesh = ringattn.init()
register()
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
text = dict(model_type="gemma3_text", vocab_size=100, num_key_value_heads=2, head_dim=8, sliding_window=64, **shape)
config = AutoConfig.for_model(
    "gemma3",
    text_config=text,
    vision_config=dict(model_type="siglip_vision_model", image_size=8, patch_size=4, vision_use_head=False, **shape),
    image_token_index=99,
    mm_tokens_per_image=4,
)
model = AutoModelForImageTextToText.from_config(config, attn_implementation="ringattn")  # every part says "ringattn" now

ids = torch.arange(240).remainder(90).view(2, 120)
ids[0, 30:34] = ids[1, 70:74] = 99  # an image in each sequence, which sees itself both ways
images = torch.rand(2, 3, 8, 8)
batch = {"input_ids": ids, "pixel_values": images, "token_type_ids": (ids == 99).long(), "labels": ids}  # as a processor has it
outputs = forward_whole(model, batch, mesh)  # whole, the same on every rank
outputs.loss.backward()
reduce_gradients(model.parameters(), mesh)  # the vision tower's, too
if mesh.get_local_rank() == 0:
    print(f"loss {outputs.loss.item():.4f}")
