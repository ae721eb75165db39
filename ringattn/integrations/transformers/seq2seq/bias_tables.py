"""Lets layers with a relative position bias (T5's) hand on their table instead of rows x keys of it.

A layer makes its bias of the rows and keys it is given, which on a rank are a part, and in the quadratic size that sharding is
there to avoid. Called on shards it gives attention its table, (buckets, heads), and which distances share a row of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.integrations.transformers.seq2seq.relative_bias import Bucket, runs


def hand_on_table(module: nn.Module) -> None:
    """From now on a module with a relative position bias hands on its table wherever it is called on shards.

    For good, since activation checkpointing calls the layers again in backward, when the model's call is over.
    """
    if not hasattr(module, "compute_bias") or not hasattr(module, "has_relative_attention_bias"):
        return
    if getattr(module, "_hands_on_table", False):
        return
    module._hands_on_table = True  # type: ignore[assignment]
    module.register_forward_pre_hook(_table_before, with_kwargs=True)
    module.register_forward_hook(_table_after, with_kwargs=True, always_call=True)


def _table_before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    its: Any = kwargs.get("ringattn")
    if not hasattr(its, "buckets"):  # not within a stack on shards
        return
    biased = module.has_relative_attention_bias
    if biased and not its.buckets:
        its.buckets = buckets_of(module, its.own.layout.length)
    vars(module)["biased_before"] = biased
    module.has_relative_attention_bias = True  # else zeros of rows x keys would be made
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
    """The buckets of all distances in a sequence: `module` computes the bias of a table that holds the number of each row."""
    probe = copy.copy(module)
    count = module.relative_attention_bias.num_embeddings
    probe._modules = module._modules | {"relative_attention_bias": _Index(count)}
    cpu = torch.device("cpu")
    before = probe.compute_bias(length, 1, device=cpu).flatten().flip(0)  # distances -(length - 1) .. 0
    behind = probe.compute_bias(1, length, device=cpu).flatten()  # 0 .. length - 1
    indices, counts = torch.unique_consecutive(torch.cat([before, behind[1:]]), return_counts=True)
    return runs(indices.tolist(), counts.tolist(), 1 - length)


class _Index(nn.Module):
    """An embedding of each number as itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = torch.zeros(count, 1)

    def forward(self, index: Tensor) -> Tensor:
        return index.unsqueeze(-1)
