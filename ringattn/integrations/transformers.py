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

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ringattn.comm.agree import agree
from ringattn.comm.group import Group, group_and_rank
from ringattn.errors import InputError, PlanError
from ringattn.integrations.mask_functions import MaskReading, read_mask
from ringattn.integrations.rows import check_models
from ringattn.integrations.rowwise import Probe
from ringattn.integrations.seq2seq import shard_seq2seq
from ringattn.integrations.shards import Shards, cut, documents_of, padding_of, text_positions, windowed
from ringattn.integrations.stacks import PADDED_BY_ITSELF, StackShards
from ringattn.integrations.towers import keeps_its_own, misplaced
from ringattn.integrations.unsupported import refuse_without_interface, sequence_of, unsupported_batch
from ringattn.layout import Layout
from ringattn.mask import causal
from ringattn.nn.group import reduction_group
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.sharding import held
from ringattn.topology import Topology

NAME = "ringattn"


OWN_FUNCTION = (
    "the mask of {layer} has a function of the model's own beside the causal mask ({function}), which ringattn cannot cut over "
    "ranks"
)


class MaskInfo(NamedTuple):
    """What transformers' mask says a layer may see; `attend` compares it with what the layer itself asks for.

    tokens: bool (batch, rows), False where this rank's rows are padding; None where `Shards` knows it already.
    reading: what the mask function means; None where a compiled graph cannot ask.
    own: makes the mask for transformers' sdpa, for layers that keep their own attention.
    function: transformers' mask function of (batch, head, query, key), which the stacks of an encoder-decoder evaluate.
    custom: whether the model has added a function of its own to that.
    """

    window: int | None
    tokens: Tensor | None = None
    reading: MaskReading | None = None
    own: Callable[[], Any] | None = None
    function: Any = None
    custom: bool = False

    @property
    def padding(self) -> Tensor | None:
        """As tokens; None where nothing is hidden."""
        return None if self.tokens is None or self.tokens.all() else self.tokens

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
    check_models()
    refuse_without_interface(name)


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
    documents_apart: bool = False,
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
        documents_apart: packed documents do not see each other, also in a model whose own masks do not look at position_ids,
            which is refused otherwise.

    Returns:
        inputs: for `model(**inputs)`; the cache is off, and `ringattn` is a `Shards`.
        targets: int64 (batch, rows), shifted before the cut, for `ringattn.nn.cross_entropy`; None without labels. The model is
            given no labels, since its own loss would be a mean over this rank alone.

    Raises:
        InputError: the batch or the model cannot be cut; says why and what to do. Raised on every rank.
    """
    check_models()
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
            shards.packed = bool(shards.mask.bounds) and not documents_apart
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
    ringattn: Shards | StackShards | Probe | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What a layer calls. query: (batch, heads, rows, head_dim); key, value: with kv_heads. Returns rows before heads.

    Raises:
        InputError: called without `shard_batch`, or for what shards cannot do.
    """
    if ringattn is None and keeps_its_own(module):
        asked = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux} | rest
        mask = attention_mask.own() if isinstance(attention_mask, MaskInfo) and attention_mask.own else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **asked)
    if ringattn is None:
        raise InputError(
            misplaced(module)
            or 'attn_implementation="ringattn" needs the whole sequence described: call model(**inputs) with the inputs of '
            "ringattn.integrations.transformers.shard_batch. To generate, or to use the model in one process, first call "
            'model.set_attn_implementation("sdpa")'
        )
    position_bias = rest.pop("position_bias", None) if isinstance(ringattn, StackShards) else None
    problem = None if isinstance(ringattn, StackShards) else _blocks_of_rows(type(module).__name__, attention_mask)
    problem = problem or _unsupported_call(module, attention_mask, dropout, sliding_window, rest)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = dict(scale=scaling, softcap=softcap, sinks=None if s_aux is None else s_aux.to(query.dtype))
    if isinstance(ringattn, StackShards):
        if isinstance(attention_mask, MaskInfo) and attention_mask.custom:
            problem = OWN_FUNCTION.format(layer=type(module).__name__, function="or_mask_function, and_mask_function")
        if problem:
            raise InputError(problem)
        return ringattn.attend(module, q, k, v, attention_mask, position_bias, **options), None
    two_ways = rest.get("is_causal") is False or not getattr(module, "is_causal", True)
    if ringattn.blocks.get(sliding_window) is not None:  # masks of the whole sequence are made, and say which keys are seen
        two_ways = False
    if isinstance(attention_mask, MaskInfo):
        problem = _unlike_causal(type(module).__name__, attention_mask, two_ways) or problem
    if isinstance(ringattn, Probe):
        if problem and not ringattn.lenient:
            raise InputError(problem)  # which the probe tells all ranks
        ringattn.packed.append(bool(attention_mask.reading and attention_mask.reading.packed))
        return ringattn.attend(module, query, key, value), None
    if problem:  # of one rank, perhaps: it meets the others' agreement on `attention`, so that they hear of it
        agree(group_and_rank(ringattn.group, ringattn.layout.world)[0], {}, problem)
    out = ringattn.attend(q, k, v, window=sliding_window, **options)
    return out, None


def describe_mask(**asked: Any) -> MaskInfo:
    """The mask interface's side: no mask is made, what it says is known to `Shards`, or made by a layer that needs it."""
    tokens, window, function = asked.get("attention_mask"), asked.get("local_size"), asked.get("mask_function")
    if torch.compiler.is_compiling() or function is None:
        reading = MaskReading(unknown="a function of the model's own") if asked.get("use_vmap") else None
    else:
        reading = read_mask(function)
    return MaskInfo(window, tokens, reading, partial(sdpa_mask, **asked), function, bool(asked.get("use_vmap")))


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
    tokens = batch.get("attention_mask")
    positions = text_positions(batch.get("position_ids"), tokens)
    bias = None if tokens is None else padding_of(tokens, positions)
    mask = documents_of(positions, tokens is not None) if bias is None and positions is not None else causal()
    layer = first_layer(text)
    heads = layer.num_attention_heads
    make = partial(make_plan, sequence_of(batch).shape[1], world=world, **choices)
    kind: dict[str, Any] = dict(
        heads=heads,
        kv_heads=getattr(layer, "num_key_value_heads", None) or heads,
        head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // heads,
        dtype=dtype or getattr(text, "dtype", None) or torch.float32,
    )
    first, *others = _windows(text)
    plan = make(**kind, mask=windowed(mask, first), layout=layout)
    _, rank = group_and_rank(group, world)
    own = None if bias is None else bias.index_select(1, held(plan.layout, rank).to(bias.device))
    shards = Shards(plan.layout, mask, partial(make, layout=plan.layout), group, own, assumed=_assumed(batch))
    for window in (first, *others):  # planned before the model runs: torch.compile would trace the planner
        shards.plan(**kind, window=window)
    return shards, plan


def first_layer(text: PretrainedConfig) -> Any:
    """The config of the first layer, where layers differ in heads or their size, as Gemma 4's; else the model's."""
    return text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text


def _assumed(batch: Mapping[str, Any]) -> str | None:
    if batch.get("position_ids") is not None:
        return None
    tokens = batch.get("attention_mask")
    return "counted" if tokens is None or tokens[:, :1].all() else "counted, left padding"


def _windows(text: PretrainedConfig) -> list[int | None]:
    """Of each kind of layer, the first layer's first: of all layers alike where the config names no kinds, as Mistral's."""
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    size = getattr(first_layer(text), "sliding_window", None)
    return list(dict.fromkeys(size if kind == "sliding_attention" else None for kind in kinds))


def _unsupported_call(module: nn.Module, mask: Any, dropout: float, window: int | None, rest: Mapping[str, Any]) -> str | None:
    """What the layer asks for and would not get on any shards, or None."""
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
    if mask.window != window:
        return (
            f"{name} asks for sliding_window={window} and its mask for {mask.window}: chunks or windows ringattn does not know"
        )
    if dropout:
        return f"{name} asks for attention dropout {dropout}; set config.attention_dropout = 0 (config.dropout_rate of T5)"
    for asked in ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k"):
        if rest.get(asked) is not None:
            return f"{name} is given {asked}, which ringattn does not take; documents are told by position_ids"
    return None


def _blocks_of_rows(name: str, mask: Any) -> str | None:
    """What a mask says of image blocks that was made of one rank's rows, or None."""
    if not isinstance(mask, MaskInfo) or mask.reading is None or mask.reading.block_ids is None:
        return None
    return (
        f"the mask of {name} has blocks of tokens that see each other in both directions, made of one rank's rows: call "
        "ringattn.integrations.whole.forward_whole(model, batch, group), where they are made of the whole sequence"
    )


def _unlike_causal(name: str, mask: Any, two_ways: bool) -> str | None:
    """What the layer asks for beside causal attention over documents, which `Shards` know, or None."""
    if mask.padding is not None:
        return PADDED_BY_ITSELF
    if mask.reading is not None and mask.reading.unknown:
        return OWN_FUNCTION.format(layer=name, function=mask.reading.unknown)
    if two_ways or (mask.reading is not None and not mask.reading.causal):
        return f"{name} asks for attention in both directions; ringattn runs causal decoders here"
    return None
