"""Computes rewards and their loss, which need the whole sequence, on three ranks.

torchrun --standalone --nproc-per-node 3 docs/examples/hf_rewards.py
"""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import ringattn
from ringattn.integrations.transformers import forward_whole, register
from ringattn.nn import reduce_gradients

mesh = ringattn.init()
register()
torch.manual_seed(0)
shape = dict(vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
config = AutoConfig.for_model("llama", **shape, num_key_value_heads=3, num_labels=1, pad_token_id=0)
model = AutoModelForSequenceClassification.from_config(config, attn_implementation="ringattn")

batch = {"input_ids": torch.arange(1, 241).view(2, 120), "labels": torch.tensor([1.0, -1.0])}  # whole, the same on every rank
outputs = forward_whole(model, batch, mesh)  # rewards and loss of one process, on every rank
outputs.loss.backward()
reduce_gradients(model.parameters(), mesh)
if mesh.get_local_rank() == 0:
    first, second = outputs.logits.flatten().tolist()
    print(f"rewards {first:.4f} and {second:.4f}, loss {outputs.loss.item():.4f}")
