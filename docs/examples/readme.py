# torchrun --standalone --nproc-per-node 4 docs/examples/readme.py
import torch
from torch.nn.functional import scaled_dot_product_attention

import ringattn

mesh = ringattn.init()  # the ranks that torchrun started: gloo, or NCCL where every rank has a GPU
plan = ringattn.make_plan(2048, world=mesh, heads=8, kv_heads=2, head_dim=64, mask=ringattn.causal())

torch.manual_seed(0)  # q, k, v as flash_attn_func takes them: (batch, seqlen, heads, headdim); the same on every rank
whole = [torch.randn(1, 2048, heads, 64, device=mesh.device_type) for heads in (8, 2, 2)]
q, k, v = (ringattn.shard(x, plan).requires_grad_() for x in whole)  # this rank's rows of the sequence
out = ringattn.attention(q, k, v, plan)  # instead of flash_attn_func(q, k, v, causal=True)
out.sum().backward()  # gradients of this rank's rows of q, k and v

dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in whole), is_causal=True, enable_gqa=True)
error = (out - ringattn.shard(dense.transpose(1, 2), plan)).abs().max()
print(f"rank {mesh.get_local_rank()}: {q.shape[1]} of 2048 rows, at most {error:.0e} from attention in one process\n", end="")
