"""What attention means, in the fewest words: dense, whole, in whatever dtype it is given. Everything is compared with this."""

from functools import lru_cache

import torch
from torch import Tensor

from ringattn import Mask


@lru_cache(maxsize=64)
def keeps(mask: Mask, rows: int, keys: int, offset: int = 0) -> Tensor:
    """(rows, keys) bool, straight from the definition of a mask; the first query stands at position `offset`."""
    return torch.tensor([[mask.keeps(offset + q, k) for k in range(keys)] for q in range(rows)])


def dense(
    q: Tensor,  # (batch, rows, heads, head_dim)
    k: Tensor,  # (batch, keys, kv_heads, head_dim)
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the textbook."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if key_bias is not None:
        bias = key_bias[:, None] if key_bias.ndim == 2 else key_bias
        logits = logits + bias.repeat_interleave(q.shape[2] // bias.shape[1], dim=1)[:, :, None]
    logits = logits.masked_fill(~keeps(mask, q.shape[1], k.shape[1], offset), -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    blind = (logits == -torch.inf).all(-1, keepdim=True)  # sees nothing: gives nothing, and has no gradient
    logits = logits.masked_fill(blind, 0.0)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    weights = torch.exp(logits - lse).masked_fill(blind, 0.0)[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.masked_fill(blind, -torch.inf).squeeze(-1)
