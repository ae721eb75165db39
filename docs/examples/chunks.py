"""Attends from queries to keys that lie elsewhere: a prompt in chunks, and cross-attention, on four ranks.

torchrun --standalone --nproc-per-node 4 docs/examples/chunks.py
"""

import torch

import ringattn
from ringattn import attention, make_plan

mesh = ringattn.init()
rank = mesh.get_local_rank()
model = dict(world=mesh, heads=8, kv_heads=2, head_dim=32, training=False)


def rows(count: int, heads: int) -> torch.Tensor:
    return torch.randn(1, count, heads, 32)


# A prompt in two chunks: the second's 100 queries meet all 300 keys so far, where they already lie.
first = make_plan(200, **model, layout="contiguous")
q, k, v = (rows(first.rows(rank), heads) for heads in (8, 2, 2))
out = attention(q, k, v, first)

layout = make_plan(100, **model, layout="contiguous").layout.after(first.layout)
second = make_plan(100, **model, layout=layout)
q, more_k, more_v = (rows(second.rows(rank), heads) for heads in (8, 2, 2))
out = attention(q, torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1), second)

# Cross-attention: queries and keys each over all ranks, any two lengths.
cross = make_plan(120, **model, kv_len=77, mask=ringattn.full())
q, k, v = rows(cross.rows(rank), 8), rows(cross.kv_rows(rank), 2), rows(cross.kv_rows(rank), 2)
out = attention(q, k, v, cross)
if rank == 0:
    print(f"second chunk: {second.rows(0)} queries and {second.kv_rows(0)} keys on rank 0, of {second.kv_len} keys in all")
    print(f"cross-attention: {cross.rows(0)} queries and {cross.kv_rows(0)} keys on rank 0")
