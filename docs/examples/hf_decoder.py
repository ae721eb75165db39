"""Trains a transformers causal language model on three ranks.

torchrun --standalone --nproc-per-node 3 docs/examples/hf_decoder.py
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ringattn
from ringattn.integrations.transformers import register, shard_batch
from ringattn.nn import cross_entropy, reduce_gradients

mesh = ringattn.init()  # the ranks that hold the sequence
register()  # attn_implementation="ringattn", attention and mask
torch.manual_seed(0)  # the same parameters on every rank; or from_pretrained(..., attn_implementation="ringattn")
config = AutoConfig.for_model(
    "llama",
    vocab_size=256,
    hidden_size=144,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="ringattn")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

text = torch.arange(1024).remainder(251)[None]  # a batch as ever, whole, the same on every rank
for step in range(5):
    batch = {"input_ids": text, "labels": text}  # attention_mask and position_ids as ever, too
    inputs, targets = shard_batch(batch, config, mesh)
    loss = cross_entropy(model(**inputs).logits, targets, mesh)  # the exact mean over all ranks
    loss.backward()
    reduce_gradients(model.parameters(), mesh)  # parameters are replicated: their gradients are summed
    optimizer.step()
    optimizer.zero_grad()
    if mesh.get_local_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
