"""Makes layers with a relative position bias (T5) pass on their table instead of a bias of rows x keys.

A layer computes its bias for its rows and keys, which on a rank are a part, and at the quadratic size that sharding avoids.
Called on shards, it passes attention its table, (buckets, heads), and the distances that share a row of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.integrations.transformers.seq2seq.relative_bias import Bucket, consecutive_buckets


def return_bias_table(module: nn.Module) -> None:
    """Makes a module with a relative position bias pass on its table whenever it is called on shards.

    Permanent, since activation checkpointing calls the layers again in backward, after the model's call.
    """
    if not hasattr(module, "compute_bias") or not hasattr(module, "has_relative_attention_bias"):
        return
    if getattr(module, "_returns_bias_table", False):
        return
    module._returns_bias_table = True  # type: ignore[assignment]
    module.register_forward_pre_hook(_table_before, with_kwargs=True)
    module.register_forward_hook(_table_after, with_kwargs=True, always_call=True)


def _table_before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    stack_shards: Any = kwargs.get("ringattn")
    if not hasattr(stack_shards, "buckets"):  # not within a stack on shards
        return
    biased = module.has_relative_attention_bias
    if biased and not stack_shards.buckets:
        stack_shards.buckets = buckets_of(module, stack_shards.own.layout.length)
    vars(module)["biased_before"] = biased
    module.has_relative_attention_bias = True  # otherwise zeros of rows x keys would be made
    module.compute_bias = (lambda *_, **__: _table(module)) if biased else (lambda *_, **__: torch.zeros(0))


def _table_after(module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
    if "biased_before" in vars(module):
        module.has_relative_attention_bias = vars(module).pop("biased_before")
        del module.compute_bias


def _table(module: Any) -> Tensor:
    """(buckets, heads), through the embedding's own forward."""
    embedding = module.relative_attention_bias
    table: Tensor = embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))
    return table


def buckets_of(module: Any, length: int) -> tuple[Bucket, ...]:
    """The buckets of all distances in a sequence, from `module` run on a table whose rows hold their index."""
    probe = copy.copy(module)
    count = module.relative_attention_bias.num_embeddings
    probe._modules = module._modules | {"relative_attention_bias": _Index(count)}
    cpu = torch.device("cpu")
    before = probe.compute_bias(length, 1, device=cpu).flatten().flip(0)  # distances -(length - 1) .. 0
    behind = probe.compute_bias(1, length, device=cpu).flatten()  # 0 .. length - 1
    indices, counts = torch.unique_consecutive(torch.cat([before, behind[1:]]), return_counts=True)
    return consecutive_buckets(indices.tolist(), counts.tolist(), 1 - length)


class _Index(nn.Module):
    """An embedding that maps each index to itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = torch.zeros(count, 1)

    def forward(self, index: Tensor) -> Tensor:
        return index.unsqueeze(-1)
