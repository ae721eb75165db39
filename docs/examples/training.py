"""Trains a small decoder whose sequence is cut over four ranks.

torchrun --standalone --nproc-per-node 4 docs/examples/training.py
"""

import torch

import ringattn
from ringattn.nn import Decoder, DecoderConfig, reduce_gradients, shift_labels

mesh = ringattn.init()
config = DecoderConfig(vocab_size=256, dim=96, layers=2, heads=6, kv_heads=2, head_dim=16, hidden_dim=256)
plan = ringattn.make_plan(1000, world=mesh, heads=6, kv_heads=2, head_dim=16, mask=ringattn.causal())

torch.manual_seed(0)  # the same parameters on every rank
model = Decoder(config).to(mesh.device_type)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

text = torch.arange(1000, device=mesh.device_type).remainder(251)[None]  # the whole sequence, the same on every rank
tokens, targets = ringattn.shard(text, plan), ringattn.shard(shift_labels(text), plan)  # this rank's rows
for step in range(5):
    loss = model.loss(tokens, targets, plan)
    loss.backward()
    reduce_gradients(model.parameters(), mesh)
    optimizer.step()
    optimizer.zero_grad()
    if mesh.get_local_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
