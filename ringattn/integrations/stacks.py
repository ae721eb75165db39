"""Lets the encoder and the decoder of a model know which rows of the whole they are given, while they are called.

Each stack is handed its own shards, so its layers need not know what else there is. Within a stack a layer is told by what it
asks for: the mask it comes with (evaluated, as transformers would) and the rows it brings. Two kinds of module see positions of
their own and are corrected here: those that embed positions are called for the whole sequence, of which this rank's rows are
taken, and those with a relative position bias hand on their table instead of rows x keys of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ringattn.comm.agree import agree
from ringattn.comm.group import group_and_rank
from ringattn.errors import InputError
from ringattn.functional import attention, cast_dtype
from ringattn.integrations.relative_bias import BiasedPlan, Bucket, plans_for, relative_attention, runs
from ringattn.integrations.seq2seq import DecoderShards, own_rows
from ringattn.integrations.shards import Shards
from ringattn.mask import END, Band, Mask, Rect
from ringattn.plan import Plan

MAKES_POSITIONS = ("position_ids", "past_key_values_length")  # arguments of a forward that embeds positions


PADDED_BY_ITSELF = (
    "attention_mask with padding reached the model: give it to shard_batch with the whole batch, and call the model "
    "with what that returns; to generate, first call model.set_attn_implementation('sdpa')"
)


@dataclass
class StackShards:
    """What the layers of one stack attend to: the stack's own rows, and those of the encoder if it is a decoder.

    ids: the whole input_ids, if the batch has any.
    padded: whether the whole ids of (this stack, the encoder) hold padding, which a model may hide by itself.
    buckets: of the relative position bias of its layers, once the first of them has been called.
    """

    own: Shards
    cross: Shards | None
    ids: Tensor | None
    name: str
    padded: tuple[bool, bool] = (False, False)
    buckets: tuple[Bucket, ...] = ()
    calls: set[str] = field(default_factory=set)  # kinds of attention that have come here
    plans: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, position_bias: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention of a layer. q, k, v: (batch, rows, heads, head_dim); mask: `MaskInfo`; options: scale, softcap, sinks."""
        band = reach(mask)
        crosses = self.cross is not None and band == Band()
        shards = self.cross if self.cross is not None and crosses else self.own
        problem = self._problem(module, band, crosses, q, k)
        if problem:
            raise InputError(problem)
        self.calls.add("cross" if crosses else "self")
        q, surplus = _without_surplus(q, shards.layout, shards)
        k, v = (_without_surplus(x, shards.layout.of_keys, shards)[0] for x in (k, v))
        key_bias = _key_bias(shards, mask.padding, self.padded[crosses], k)
        if position_bias is None or not position_bias.numel():
            plan = self._plan(shards, q, k, crosses, Mask(str(band), (Rect(0, END, 0, END, band),)))
            out: Tensor = attention(q, k, v, plan, key_bias=key_bias, group=shards.group, **options)
        else:
            plans = self._plans(shards, q, k, band)
            scale = options.pop("scale")
            if crosses or any(option is not None for option in options.values()):
                raise InputError(
                    f"{type(module).__name__} has a position bias together with {', '.join(options)} or across stacks"
                )
            out = relative_attention(q, k, v, position_bias, plans, key_bias=key_bias, scale=scale, group=shards.group)
        return torch.cat([out, out.new_zeros(len(out), surplus, *out.shape[2:])], dim=1) if surplus else out

    def _problem(self, module: nn.Module, band: Band, crosses: bool, q: Tensor, k: Tensor) -> str | None:
        """What this layer asks for that its stack does not have, or None."""
        layer, asked = type(module).__name__, getattr(module, "is_causal", band.right == 0)
        if asked != (band.right == 0):
            return f"{layer} has is_causal={asked} and a mask that keeps distances {band.left} to {band.right}"
        if self.cross is not None and not crosses and band.right != 0:
            return f"{layer} of the decoder asks for distances {band.left} to {band.right}, neither causal nor all keys"
        shards = self.cross if self.cross is not None and crosses else self.own
        rank = group_and_rank(shards.group, shards.layout.world)[1]
        rows, keys = (max(layout.rows(rank), 1) for layout in (shards.layout, shards.layout.of_keys))
        if (q.shape[1], k.shape[1]) != (rows, keys):
            return f"{layer} attends from {q.shape[1]} to {k.shape[1]} rows; of its sequences this rank has {rows} and {keys}"
        return None

    def _plan(self, shards: Shards, q: Tensor, k: Tensor, crosses: bool, mask: Mask, **choices: Any) -> Plan:
        key = (crosses, q.shape[2:], k.shape[2], cast_dtype(q), mask)
        if key not in self.plans:
            self.plans[key] = shards.make(
                heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3], dtype=cast_dtype(q), mask=mask, **choices
            )
        plan: Plan = self.plans[key]
        return plan

    def _plans(self, shards: Shards, q: Tensor, k: Tensor, band: Band) -> tuple[BiasedPlan, ...]:
        """Plans of all buckets that a layer with this mask sees. A ring each: few rows of a narrow band travel at all."""
        key = (q.shape[2:], k.shape[2], cast_dtype(q), band)
        if key not in self.plans:
            seen = [bucket for bucket in self.buckets if bucket.left <= band.right and bucket.right >= band.left]
            within = [b._replace(left=max(b.left, band.left), right=min(b.right, band.right)) for b in seen]
            self.plans[key] = plans_for(within, lambda mask: self._plan(shards, q, k, False, mask, schedule="ring"))
        plans: tuple[BiasedPlan, ...] = self.plans[key]
        return plans


def _key_bias(shards: Shards, padding: Tensor | None, padded: bool, k: Tensor) -> Tensor | None:
    """What hides padding: the batch's attention_mask, or without one a mask that the model has made of ids on its own.

    padded: known to all ranks alike, so that all have a bias or none.
    """
    if shards.key_bias is not None or not padded:
        if padding is not None:
            raise InputError(PADDED_BY_ITSELF)
        return shards.key_bias
    bias = torch.zeros(k.shape[:2], device=k.device)
    return bias if padding is None else bias.masked_fill(~padding[:, : k.shape[1]].to(k.device), -torch.inf)


def _without_surplus(x: Tensor, layout: Any, shards: Shards) -> tuple[Tensor, int]:
    """Without the one row that a rank without any is given; and how many rows that were."""
    rows = layout.rows(group_and_rank(shards.group, layout.world)[1])
    return x[:, :rows], x.shape[1] - rows


def reach(mask: Any) -> Band:
    """The distances (key minus query) that transformers' mask function keeps, found by evaluating it; mask: `MaskInfo`.

    Raises `InputError` for a mask that is no band.
    """
    far = 2 * (mask.window or 1) + 2
    place = torch.zeros((), dtype=torch.int64)
    kept = mask.function(place, place, place + far, torch.arange(2 * far + 1)).expand(2 * far + 1)
    distances = (kept.nonzero().flatten() - far).tolist()
    if not distances or len(distances) != distances[-1] - distances[0] + 1:
        raise InputError("the mask function of this model keeps no run of distances, which ringattn cannot cut over ranks")
    first, last = distances[0], distances[-1]
    return Band(-END if first == -far else first, END if last == far else last)


@contextmanager
def on_stacks(model: Any, shards: Any) -> Iterator[None]:
    """While it lasts, the encoder and decoder of `model` are given their shards; nothing changes for other models."""
    handles = place(model, shards) if isinstance(shards, DecoderShards) else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def place(model: Any, shards: DecoderShards) -> list[Any]:
    """Hooks on the stacks of `model`, to be removed after its call. Raises `InputError` on every rank."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    problem = unsupported_stacks(model, encoder, decoder)
    group, _ = group_and_rank(shards.group, shards.layout.world)
    if problem or not torch.compiler.is_compiling():
        agree(group, {"call": "an encoder-decoder model"}, problem)
    source, target = (_has(ids, stack) for ids, stack in zip(shards.ids, (encoder, decoder), strict=True))
    stacks = (
        (encoder, StackShards(shards.encoder, None, shards.ids[0], "encoder", (source, source))),
        (decoder, StackShards(shards, shards.cross, shards.ids[1], "decoder", (target, source))),
    )
    handles: list[Any] = []
    for stack, its in stacks:
        handles.append(stack.register_forward_pre_hook(_Given(its), with_kwargs=True))
        handles.append(stack.register_forward_hook(_Came(its)))
        for module in _embed_positions(stack):
            whole = _Whole(its)
            handles.append(module.register_forward_pre_hook(whole.before, with_kwargs=True))
            handles.append(module.register_forward_hook(whole.after))
        for module in stack.modules():
            _hand_on_table(module)
    return handles


def _has(ids: Tensor | None, stack: Any) -> bool:
    """Whether the whole ids hold the stack's padding."""
    padding = getattr(stack.config.get_text_config(), "pad_token_id", None)
    return ids is not None and padding is not None and bool((ids == padding).any())


def unsupported_stacks(model: Any, encoder: Any, decoder: Any) -> str | None:
    """Why the stacks of this model cannot run on a part of their rows, or None."""
    name = type(model).__name__
    if model in (encoder, decoder) or encoder is decoder:
        return f"{name} has no encoder and decoder of its own that ringattn could hand their rows to"
    if model.base_model is not model and model.get_output_embeddings() is None:
        return (
            f"{name} has a head of another kind than a vocabulary's, which may pool over rows, and a rank has only its own. "
            "Use ringattn.integrations.whole.forward_whole(model, batch, group), which runs it on the whole sequence"
        )
    for stack in (encoder, decoder):
        dropped = getattr(stack, "layerdrop", 0.0)
        if stack.training and dropped:
            return (
                f"{type(stack).__name__} leaves out layers at random (layerdrop={dropped}), on each rank others; set "
                "config.encoder_layerdrop and config.decoder_layerdrop to 0"
            )
        for module in stack.modules():
            if hasattr(module, "expert_capacity"):
                return (
                    f"{type(module).__name__} has experts of a limited capacity, which the tokens of the sequence fill up in "
                    "order: which of this rank's tokens still find room depends on those of other ranks. Use a model without"
                )
    return None


class _Given:
    """Hands a stack its shards."""

    def __init__(self, its: StackShards) -> None:
        self.its = its

    def __call__(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.its.calls.clear()
        return args, kwargs | {"ringattn": self.its}


class _Came:
    """Makes sure that the attention of a stack came to ringattn."""

    def __init__(self, its: StackShards) -> None:
        self.its = its

    def __call__(self, stack: nn.Module, args: Any, outputs: Any) -> None:
        expected = {"self"} if self.its.cross is None else {"self", "cross"}
        if missing := expected - self.its.calls:
            raise InputError(
                f"{' and '.join(sorted(missing))} attention of {type(stack).__name__} did not come to ringattn: this model "
                "computes it by itself, on this rank's rows alone; use a model whose attention goes through transformers' "
                "AttentionInterface"
            )


def _embed_positions(stack: nn.Module) -> Iterator[nn.Module]:
    """Modules beside the layers whose forward makes positions, as its arguments tell."""
    for child in stack.children():
        if isinstance(child, nn.ModuleList | GradientCheckpointingLayer):
            continue
        has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
        if not has_layers and set(MAKES_POSITIONS) & set(inspect.signature(child.forward).parameters):
            yield child
        else:
            yield from _embed_positions(child)


class _Whole:
    """Calls a module that embeds positions for the whole sequence, and takes this rank's rows of what it returns.

    What such a module is given of this rank's rows is their ids, their shape, or positions 0, 1, 2, ... Of a tensor that is
    asked for its shape the whole holds NaN, so that one whose numbers are used is found.
    """

    def __init__(self, its: StackShards) -> None:
        self.its, self.rows, self.length = its, own_rows(its.own), its.own.layout.length

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(self._whole(x) for x in args), {name: self._whole(x) for name, x in kwargs.items()}

    def _whole(self, x: Any) -> Any:
        count = len(self.rows)
        if isinstance(x, tuple) and len(x) > 1 and x[1] == count:  # a shape
            return type(x)((x[0], self.length, *x[2:]))
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        places = torch.arange(count, device=x.device)
        if not x.is_floating_point() and x.numel() == count and torch.equal(x.flatten(), places):
            return torch.arange(self.length, device=x.device).view([-1 if n == count else n for n in x.shape])
        if x.ndim > 1 and x.shape[1] == count:
            if x.is_floating_point():
                return x.new_full((), float("nan")).expand(x.shape[0], self.length, *x.shape[2:])
            if self.its.ids is not None and torch.equal(x, self.its.ids.to(x.device).index_select(1, self.rows.to(x.device))):
                return self.its.ids.to(x.device)
        raise InputError(
            f"{self.its.name} positions are made of a tensor of shape {tuple(x.shape)} that holds neither ids nor places"
        )

    def after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if isinstance(outputs, tuple):
            return tuple(self.after(module, args, x) for x in outputs)
        dim = 0 if outputs.ndim == 2 else 1
        if outputs.shape[dim] != self.length:
            name, shape = type(module).__name__, tuple(outputs.shape)
            raise InputError(f"{name} returned positions of shape {shape}, which are not those of {self.length} rows")
        own = outputs.index_select(dim, self.rows.to(outputs.device))
        if own.isnan().any():
            raise InputError(f"{type(module).__name__} makes positions of the numbers of its rows, which only their ranks have")
        return own


def _hand_on_table(module: nn.Module) -> None:
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
    its = kwargs.get("ringattn")
    if not isinstance(its, StackShards):
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
