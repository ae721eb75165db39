"""Computes the attention of a model's layers on shards, and refuses layer options that shards do not support.

The attention interface passes one rank's q, k, v; the mask interface describes what a layer may see. `Shards` knows the whole
sequence, so no mask is made: `attend` compares both descriptions, and refuses what would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ringattn.comm.consistency import agree
from ringattn.comm.process_group import group_and_rank
from ringattn.errors import InputError
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.composite.towers import keeps_own_attention, misplaced_tower
from ringattn.integrations.transformers.mask_functions import MaskReading, read_mask
from ringattn.integrations.transformers.seq2seq.stacks import PADDED_BY_ITSELF, StackShards
from ringattn.integrations.transformers.support.rowwise import WITHOUT_SHARDS, Probe

OWN_FUNCTION = (
    "the mask of {layer} has a function of the model's own beside the causal mask ({function}), which ringattn cannot shard "
    "over ranks"
)


class MaskInfo(NamedTuple):
    """Describes transformers' mask for a layer; `attend` compares it with the options of the layer.

    tokens: bool (batch, rows), False where this rank's rows are padding; None where `Shards` has the padding.
    reading: the meaning of the mask function; None in a compiled graph.
    own: makes the mask for transformers' sdpa, for layers that keep their own attention.
    function: transformers' mask function of (batch, head, query, key), which the stacks of an encoder-decoder evaluate.
    custom: whether the model added a function of its own.
    """

    window: int | None
    tokens: Tensor | None = None
    reading: MaskReading | None = None
    own: Callable[[], Any] | None = None
    function: Any = None
    custom: bool = False

    @property
    def padding(self) -> Tensor | None:
        """`tokens`, or None where no row is padding."""
        return None if self.tokens is None or self.tokens.all() else self.tokens

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(
            "a layer of this model uses its attention mask itself: its attention does not run in ringattn "
            "and would see this rank's rows alone; use a model whose attention goes through transformers' AttentionInterface"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ringattn: Shards | StackShards | Probe | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of a layer.

    query: (batch, heads, rows, head_dim); key, value: with kv_heads. Returns (batch, rows, heads, head_dim).

    Raises:
        InputError: called without `shard_batch`, or with an option that shards do not support.
    """
    if ringattn is None and keeps_own_attention(module):
        options = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux} | rest
        mask = attention_mask.own() if isinstance(attention_mask, MaskInfo) and attention_mask.own else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    if ringattn is None:
        raise InputError(misplaced_tower(module) or WITHOUT_SHARDS)
    position_bias = rest.pop("position_bias", None) if isinstance(ringattn, StackShards) else None
    problem = None if isinstance(ringattn, StackShards) else _block_problem(type(module).__name__, attention_mask)
    problem = problem or _unsupported_call(module, attention_mask, dropout, sliding_window, rest)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = dict(scale=scaling, softcap=softcap, sinks=None if s_aux is None else s_aux.to(query.dtype))
    if isinstance(ringattn, StackShards):
        if isinstance(attention_mask, MaskInfo) and attention_mask.custom:
            problem = OWN_FUNCTION.format(layer=type(module).__name__, function="or_mask_function, and_mask_function")
        if problem:
            raise InputError(problem)
        return ringattn.attend(module, q, k, v, attention_mask, position_bias, **options), None
    bidirectional = rest.get("is_causal") is False or not getattr(module, "is_causal", True)
    if ringattn.blocks.get(sliding_window) is not None:  # the blocks determine which keys are seen
        bidirectional = False
    if isinstance(attention_mask, MaskInfo):
        problem = _noncausal_problem(type(module).__name__, attention_mask, bidirectional) or problem
    if isinstance(ringattn, Probe):
        if problem and not ringattn.lenient:
            raise InputError(problem)  # the trial raises it on all ranks
        ringattn.packed.append(bool(attention_mask.reading and attention_mask.reading.packed))
        return ringattn.attend(module, query, key, value), None
    if problem:  # possibly of one rank only: matches the `agree` call of `attention` on the others, which then raise
        agree(group_and_rank(ringattn.group, ringattn.layout.world)[0], {}, problem)
    out = ringattn.attend(q, k, v, window=sliding_window, **options)
    return out, None


def describe_mask(**kwargs: Any) -> MaskInfo:
    """The registered mask function: describes the mask without making it; a layer that needs the tensor makes it."""
    tokens, window, function = kwargs.get("attention_mask"), kwargs.get("local_size"), kwargs.get("mask_function")
    if torch.compiler.is_compiling() or function is None:
        reading = MaskReading(unknown="a function of the model's own") if kwargs.get("use_vmap") else None
    else:
        reading = read_mask(function)
    return MaskInfo(window, tokens, reading, partial(sdpa_mask, **kwargs), function, bool(kwargs.get("use_vmap")))


def _unsupported_call(module: nn.Module, mask: Any, dropout: float, window: int | None, rest: Mapping[str, Any]) -> str | None:
    """The reason why options of the layer are not supported on shards, or None."""
    name = type(module).__name__
    if mask is None:
        return (
            "attention was called without its mask: the mask interface does not know this attention; register both with "
            "ringattn.integrations.transformers.register(name); to an encoder-decoder give attention_mask with the batch"
        )
    if not isinstance(mask, MaskInfo):
        return (
            f"attention_mask of {name} is a {type(mask).__name__} of shape {tuple(getattr(mask, 'shape', ()))}, made by hand: "
            "ringattn takes padding as (batch, seq_len) and documents as position_ids, both by shard_batch"
        )
    if mask.window != window:
        return (
            f"{name} asks for sliding_window={window} and its mask for {mask.window}: ringattn does not support such chunks or "
            "windows"
        )
    if dropout:
        return f"{name} asks for attention dropout {dropout}; set config.attention_dropout = 0 (config.dropout_rate of T5)"
    for option in ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k"):
        if rest.get(option) is not None:
            return f"{name} is given {option}, which ringattn does not take; documents are given by position_ids"
    return None


def _block_problem(name: str, mask: Any) -> str | None:
    """The reason why a mask with image blocks of one rank's rows is refused, or None."""
    if not isinstance(mask, MaskInfo) or mask.reading is None or mask.reading.block_ids is None:
        return None
    return (
        f"the mask of {name} has blocks of tokens that see each other in both directions, made of one rank's rows: call "
        "ringattn.integrations.transformers.forward_whole(model, batch, group), where they are made of the whole sequence"
    )


def _noncausal_problem(name: str, mask: Any, bidirectional: bool) -> str | None:
    """The reason why the mask is more than the causal mask with documents of `Shards`, or None."""
    if mask.padding is not None:
        return PADDED_BY_ITSELF
    if mask.reading is not None and mask.reading.unknown:
        return OWN_FUNCTION.format(layer=name, function=mask.reading.unknown)
    if bidirectional or (mask.reading is not None and not mask.reading.causal):
        return f"{name} asks for attention in both directions; ringattn runs causal decoders here"
    return None
