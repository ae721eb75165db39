"""Attends under a mask of packed documents and a window, with biases and sinks, on four ranks.

torchrun --standalone --nproc-per-node 4 docs/examples/masks.py
"""

import torch

import ringattn
from ringattn import documents, make_plan, sliding_window

mesh = ringattn.init()
rank = mesh.get_local_rank()

# Five documents packed into 500 tokens, each with a window of 64; one straddles ranks, one has a single token.
mask = documents((0, 210, 211, 300, 320, 500)) & sliding_window(64)
plan = make_plan(500, world=mesh, heads=8, kv_heads=2, head_dim=32, mask=mask)

torch.manual_seed(rank)
q, k, v = (torch.randn(1, plan.rows(rank), heads, 32, requires_grad=True) for heads in (8, 2, 2))
bias = torch.zeros(1, plan.kv_rows(rank), requires_grad=True)
sinks = torch.zeros(8, requires_grad=True)
out = ringattn.attention(q, k, v, plan, key_bias=bias, sinks=sinks, softcap=30.0, scale=0.2)
out.sum().backward()  # gradients of q, k, v, bias and sinks
if rank == 0:
    print(plan)
