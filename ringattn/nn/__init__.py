"""Provides a Llama-shaped decoder on sharded sequences, and the loss and gradient reductions of a sharded training step.

    logits = Decoder(config)(tokens, plan)            each rank: its own rows, positions from the plan
    loss = cross_entropy(logits, targets)             the global mean; targets are shifted before sharding
    reduce_gradients(model.parameters())              parameters are replicated, so gradients are summed

With a plan for one rank the same class with the same parameters is the ordinary single-process model: only `attention` and the
two reductions depend on how the sequence is sharded.
"""

from ringattn.nn.config import DecoderConfig
from ringattn.nn.decoder import MLP, Block, Decoder, SelfAttention
from ringattn.nn.grads import reduce_gradients
from ringattn.nn.loss import cross_entropy, shift_labels
from ringattn.nn.merging import Merging, MergingDecoder
from ringattn.nn.rotary import apply_rotary, rotary

__all__ = [
    "Block",
    "Decoder",
    "DecoderConfig",
    "MLP",
    "SelfAttention",
    "Merging",
    "MergingDecoder",
    "apply_rotary",
    "cross_entropy",
    "reduce_gradients",
    "rotary",
    "shift_labels",
]
