"""Runs Hugging Face transformers models on sequences sharded over ranks, with attn_implementation="ringattn"."""

from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.whole_batch import forward_whole

__all__ = ["forward_whole", "register", "shard_batch"]
