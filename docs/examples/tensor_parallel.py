"""Trains with tensor parallel, FSDP2 and the sequence cut, two ranks each way.

torchrun --standalone --nproc-per-node 4 docs/examples/tensor_parallel.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

import ringattn
from ringattn.integrations.transformers import register, shard_batch
from ringattn.nn import cross_entropy

device = ringattn.init().device_type
mesh = init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("sequence", "tensor"))

register()
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama",
    vocab_size=256,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=6,  # 3 on each tensor parallel rank: tensor parallel divides heads, ringattn the sequence
    num_key_value_heads=2,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="ringattn").to(device)
for layer in model.model.layers:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan = dict.fromkeys(columns, ColwiseParallel()) | dict.fromkeys(rows, RowwiseParallel())
    parallelize_module(layer, mesh["tensor"], plan)
    fully_shard(layer, mesh=mesh["sequence"])
fully_shard(model, mesh=mesh["sequence"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(3):
    text = torch.randint(0, 256, (1, 512), generator=torch.Generator().manual_seed(step)).to(device)
    inputs, targets = shard_batch({"input_ids": text, "labels": text}, config, mesh["sequence"])
    logits = model(**inputs).logits
    loss = cross_entropy(logits, targets, mesh["sequence"], averaged_over=mesh["sequence"].size())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
