"""Trains with FSDP2, two replicas of two ranks each, and saves a distributed checkpoint.

torchrun --standalone --nproc-per-node 4 docs/examples/fsdp2.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import ringattn
from ringattn.integrations.transformers import register, shard_batch
from ringattn.nn import cross_entropy

device = ringattn.init().device_type  # joins the group, takes the GPU
mesh = init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "sequence"))
everyone = mesh["data", "sequence"]._flatten("everyone")  # parameters are sharded over all ranks

register()
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama",
    vocab_size=256,
    hidden_size=72,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="ringattn").to(device)
model.gradient_checkpointing_enable()
for layer in model.model.layers:
    fully_shard(layer, mesh=everyone)
fully_shard(model, mesh=everyone)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

ACCUMULATED = 2


def micro_batch(step: int, micro: int):
    source = torch.Generator().manual_seed(1000 * step + 10 * micro + mesh["data"].get_local_rank())
    text = torch.randint(0, 256, (1, 512), generator=source).to(device)  # this replica's, the same on its two ranks
    labels = text.clone()
    labels[:, : 200 * micro] = -100  # micro-batches with different numbers of targets
    return shard_batch({"input_ids": text, "labels": labels}, config, mesh["sequence"])


for step in range(3):
    micro_batches = [micro_batch(step, micro) for micro in range(ACCUMULATED)]
    num_items = sum((targets != -100).sum() for _, targets in micro_batches)
    dist.all_reduce(num_items)  # the targets of the whole step, over all ranks and micro-batches
    total = 0.0
    for micro, (inputs, targets) in enumerate(micro_batches):
        model.set_requires_gradient_sync(micro == ACCUMULATED - 1)
        logits = model(**inputs).logits
        # FSDP averages over all ranks. Divided by num_items, losses add up to the mean over the tokens of the step.
        loss = cross_entropy(logits, targets, everyone, averaged_over=everyone.size(), num_items=num_items)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {total:.4f}")

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
parameters, moments = get_state_dict(model, optimizer)
dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=folder[0])
dcp.load({"model": parameters, "optimizer": moments}, checkpoint_id=folder[0])
set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)
