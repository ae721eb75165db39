"""Trains an encoder-decoder model on three ranks.

torchrun --standalone --nproc-per-node 3 docs/examples/hf_t5.py
"""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import ringattn
from ringattn.integrations.transformers import register, shard_batch
from ringattn.nn import cross_entropy, reduce_gradients

mesh = ringattn.init()
register()
torch.manual_seed(0)
shape = dict(vocab_size=256, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=3, dropout_rate=0.0)
config = AutoConfig.for_model("t5", **shape, pad_token_id=0, decoder_start_token_id=0)
model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="ringattn")

batch = {"input_ids": torch.arange(1, 241).view(2, 120), "labels": torch.arange(1, 61).view(2, 30)}  # whole, on every rank
inputs, targets = shard_batch(batch, config, mesh, schedule="ring")  # rows of the encoder and of the decoder
loss = cross_entropy(model(**inputs).logits, targets, mesh)  # labels of an encoder-decoder are not shifted
loss.backward()
reduce_gradients(model.parameters(), mesh)
if mesh.get_local_rank() == 0:
    print(f"loss {loss.item():.4f}")
