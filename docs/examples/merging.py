"""Merges tokens over four ranks, attends to the shorter sequence, and goes back to all rows.

torchrun --standalone --nproc-per-node 4 docs/examples/merging.py
"""

import torch

import ringattn
from ringattn.merging import shorten, similar

mesh = ringattn.init()
model = dict(world=mesh, heads=4, kv_heads=2, head_dim=16)
plan = ringattn.make_plan(1000, **model)  # causal
torch.manual_seed(mesh.get_local_rank())
x = torch.randn(1, plan.rows(mesh.get_local_rank()), 64, requires_grad=True)

merge = similar(x, plan.layout, window=16, remove=0.5)  # or windows(1000, 2), segments(...), bipartite(...)
short = shorten(merge, plan, schedule="token_ring")
y = short.merge(x)  # this rank's groups: means of their rows
q, k, v = (torch.stack([y[..., n : n + 16] for n in range(0, 16 * heads, 16)], dim=2) for heads in (4, 2, 2))
out = ringattn.attention(q, k, v, short.plan, key_bias=short.key_bias)  # a group weighs as much as its rows
back = short.unmerge(out.flatten(2))  # this rank's rows again; each gets the last group that was ready there
back.sum().backward()
if mesh.get_local_rank() == 0:
    print(short.plan)
