"""Hugging Face transformers: `attn_implementation="ringattn"` for decoders whose attention goes through AttentionInterface.

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="ringattn")
    inputs, targets = shard_batch(batch, model.config, mesh)         # a batch as ever, the same on each rank
    loss = cross_entropy(model(**inputs).logits, targets, mesh)      # ringattn.nn's: the exact mean over all ranks

`inputs` carries a `Shards` through the model's keyword arguments to each layer, so nothing is kept between calls and recomputed
layers find the same. The mask interface is registered as well: without it transformers hands no mask on, and padding would be
dropped without a word. What shards cannot do (generate, dropout, masks of one's own, layers that carry a state along the
sequence) is refused with what to do instead. Interfaces: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from ringattn.comm.agree import agree
from ringattn.comm.group import Group, group_and_rank
from ringattn.errors import InputError, PlanError
from ringattn.integrations.rows import check_outputs
from ringattn.integrations.seq2seq import shard_seq2seq
from ringattn.integrations.shards import Shards, cut, documents_of, padding_of, windowed
from ringattn.integrations.stacks import PADDED_BY_ITSELF, StackShards
from ringattn.integrations.unsupported import sequence_of, unsupported_batch
from ringattn.layout import Layout
from ringattn.mask import causal
from ringattn.nn.group import reduction_group
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.sharding import held
from ringattn.topology import Topology

NAME = "ringattn"


class MaskInfo(NamedTuple):
    """What transformers' mask says a layer may see; `attend` compares it with what the layer itself asks for.

    tokens: bool (batch, rows), False where this rank's rows are padding; None where `Shards` knows it already.
    function: transformers' mask function of (batch, head, query, key), which the stacks of an encoder-decoder evaluate.
    padding: as tokens, of a mask that came to the model by itself; None where it hides nothing.
    """

    window: int | None
    tokens: Tensor | None = None
    function: Any = None
    padding: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(
            "a layer of this model computes with its attention mask by itself: its attention does not come to ringattn and "
            "would see this rank's rows alone; use a model whose attention goes through transformers' AttentionInterface"
        )


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` known to transformers, attention and mask. Once per process, before models are made."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, describe_mask)
    check_outputs()


def shard_batch(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None = None,
    *,
    schedule: str = "auto",
    layout: str | Layout = "auto",
    topology: Topology | str | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], Tensor | None]:
    """Cut a batch for this rank: the keyword arguments for the model, and the targets of its rows.

    Args:
        batch: what a single process would give the model, the same on every rank of `group`: `input_ids` or `inputs_embeds`
            (batch, seq_len, ...), and if wanted `labels` (not shifted), `attention_mask` (batch, seq_len; padding on either
            side), `position_ids` (batch or 1, seq_len; where they begin anew a packed document begins). Further tensors
            (batch, seq_len, ...) are cut alike, whatever else there is goes through.
        config: the model's. Its layers must be softmax attention, causal.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group, if there is one, by default.
        schedule, layout, topology, training: for `make_plan`.
        dtype: that attention will see, for the choice of the layout; the model's by default.

    Returns:
        inputs: for `model(**inputs)`; the cache is off, and `ringattn` is a `Shards`.
        targets: int64 (batch, rows), shifted before the cut, for `ringattn.nn.cross_entropy`; None without labels. The model is
            given no labels, since its own loss would be a mean over this rank alone.

    Raises:
        InputError: the batch or the model cannot be cut; says why and what to do. Raised on every rank.
    """
    process_group = reduction_group(group)
    world = 1 if process_group is None else torch.distributed.get_world_size(process_group)
    _, rank = group_and_rank(group, world)
    said: dict[str, object] = {}
    if getattr(config, "is_encoder_decoder", False):
        choices = dict(schedule=schedule, topology=topology, training=training)
        both, inputs, targets = shard_seq2seq(batch, config, group, world, dtype, layout, choices)
        return {**inputs, "use_cache": False, NAME: both}, targets
    problem = unsupported_batch(batch, config)
    shards = None
    if problem is None:
        try:
            choices = dict(schedule=schedule, topology=topology, training=training)
            shards, plan = _shards(batch, config, group, world, dtype, layout, choices)
            said = {"shape": tuple(sequence_of(batch).shape), "plan": plan.digest}
        except (InputError, PlanError) as error:  # of one rank, perhaps: the others must hear of it
            problem = str(error)
    agree(process_group, {"call": "shard_batch", **said}, problem)
    assert shards is not None  # else all ranks have raised
    inputs, targets = cut(batch, shards.layout, rank)
    return {**inputs, "use_cache": False, NAME: shards}, targets


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
    ringattn: Shards | StackShards | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What a layer calls. query: (batch, heads, rows, head_dim); key, value: with kv_heads. Returns rows before heads.

    Raises:
        InputError: called without `shard_batch`, or for what shards cannot do.
    """
    if ringattn is None:
        raise InputError(
            'attn_implementation="ringattn" needs the whole sequence described: call model(**inputs) with the inputs of '
            "ringattn.integrations.transformers.shard_batch. To generate, or to use the model in one process, first call "
            'model.set_attn_implementation("sdpa")'
        )
    in_stack = isinstance(ringattn, StackShards)
    position_bias = rest.pop("position_bias", None) if in_stack else None
    problem = _unsupported_call(module, attention_mask, dropout, sliding_window, rest, in_stack)
    if problem:
        raise InputError(problem)
    sinks = None if s_aux is None else s_aux.to(query.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if isinstance(ringattn, StackShards):
        options = dict(scale=scaling, softcap=softcap, sinks=sinks)
        return ringattn.attend(module, q, k, v, attention_mask, position_bias, **options), None
    out = ringattn.attend(q, k, v, window=sliding_window, scale=scaling, softcap=softcap, sinks=sinks)
    return out, None


def describe_mask(
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    mask_function: Any = None,
    **rest: Any,
) -> MaskInfo:
    """The mask interface's side: no mask of this rank's rows is made, what it stands for is known to `Shards`.

    Raises:
        InputError: a mask function of the model's own.
    """
    if use_vmap:
        raise InputError("this model adds a mask function of its own to the causal mask, which ringattn cannot cut over ranks")
    padding = None if attention_mask is None or attention_mask.all() else attention_mask
    return MaskInfo(local_size, function=mask_function, padding=padding)


def _shards(
    batch: Mapping[str, Any],
    config: PretrainedConfig,
    group: Group | None,
    world: int,
    dtype: torch.dtype | None,
    layout: str | Layout,
    choices: dict[str, Any],
) -> tuple[Shards, Plan]:
    """How the batch is cut, and the plan that settled its layout: that of the model's first kind of layer."""
    text = config.get_text_config()
    positions, tokens = batch.get("position_ids"), batch.get("attention_mask")
    bias = None if tokens is None else padding_of(tokens, positions)
    mask = documents_of(positions, tokens is not None) if bias is None and positions is not None else causal()
    heads = text.num_attention_heads
    make = partial(make_plan, sequence_of(batch).shape[1], world=world, **choices)
    kind: dict[str, Any] = dict(
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype or getattr(text, "dtype", None) or torch.float32,
    )
    first, *others = _windows(text)
    plan = make(**kind, mask=windowed(mask, first), layout=layout)
    _, rank = group_and_rank(group, world)
    own = None if bias is None else bias.index_select(1, held(plan.layout, rank).to(bias.device))
    shards = Shards(plan.layout, mask, partial(make, layout=plan.layout), group, own)
    for window in (first, *others):  # planned before the model runs: torch.compile would trace the planner
        shards.plan(**kind, window=window)
    return shards, plan


def _windows(text: PretrainedConfig) -> list[int | None]:
    """Of each kind of layer, the first layer's first: of all layers alike where the config names no kinds, as Mistral's."""
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    size = getattr(text, "sliding_window", None)
    return list(dict.fromkeys(size if kind == "sliding_attention" else None for kind in kinds))


def _unsupported_call(
    module: nn.Module, mask: Any, dropout: float, window: int | None, rest: Mapping[str, Any], in_stack: bool = False
) -> str | None:
    """What the layer asks for and would not get, or None. in_stack: of an encoder-decoder, see `stacks`."""
    name = type(module).__name__
    if mask is None:
        return (
            "attention came without its mask: the mask interface does not know this attention; register both with "
            "ringattn.integrations.transformers.register(name); to an encoder-decoder give attention_mask with the batch"
        )
    if not isinstance(mask, MaskInfo):
        return (
            f"attention_mask of {name} is a {type(mask).__name__} of shape {tuple(getattr(mask, 'shape', ()))}, made by hand: "
            "ringattn takes padding as (batch, seq_len) and documents as position_ids, both by shard_batch"
        )
    if mask.padding is not None and not in_stack:
        return PADDED_BY_ITSELF
    if mask.window != window:
        return (
            f"{name} asks for sliding_window={window} and its mask for {mask.window}: chunks or windows ringattn does not know"
        )
    if dropout:
        return f"{name} asks for attention dropout {dropout}; set config.attention_dropout = 0 (config.dropout_rate of T5)"
    for asked in ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k"):
        if rest.get(asked) is not None:
            return f"{name} is given {asked}, which ringattn does not take; documents are told by position_ids"
    if not in_stack and (rest.get("is_causal") is False or not getattr(module, "is_causal", True)):
        return f"{name} asks for attention in both directions; ringattn runs causal decoders here"
    return None
