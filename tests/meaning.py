"""What attention means, in the fewest words: dense, whole, in whatever dtype it is given. Everything is compared with this."""

from functools import lru_cache

import torch
from torch import Tensor

from ringattn import Mask


@lru_cache(maxsize=64)
def keeps(mask: Mask, length: int) -> Tensor:
    """(length, length) bool, straight from the definition of a mask."""
    return torch.tensor([[mask.keeps(q, k) for k in range(length)] for q in range(length)])


def dense(
    q: Tensor,  # (batch, length, heads, head_dim)
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
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
    logits = logits.masked_fill(~keeps(mask, q.shape[1]), -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse
