"""Passes the shards of the whole sequences to the encoder and the decoder of a model while they are called.

Each stack gets its own shards, so its layers need no other information. Within a stack a layer is recognised by its mask
(evaluated, as transformers would) and the number of its rows. Two kinds of module depend on positions of the whole sequence and
get them: see `positions` and `bias_tables`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.comm.consistency import agree
from ringattn.comm.process_group import group_and_rank
from ringattn.errors import InputError
from ringattn.execution.attention import attention, cast_dtype
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards, has_padding
from ringattn.integrations.transformers.seq2seq.bias_tables import return_bias_table
from ringattn.integrations.transformers.seq2seq.positions import WholePositions, embed_positions
from ringattn.integrations.transformers.seq2seq.relative_bias import BiasedPlan, Bucket, plans_for, relative_attention
from ringattn.plan.plan import Plan
from ringattn.sequence.mask import END, Band, Mask, Rect

PADDED_BY_ITSELF = (
    "attention_mask with padding reached the model: give it to shard_batch with the whole batch, and call the model "
    "with what that returns; to generate, first call model.set_attn_implementation('sdpa')"
)


@dataclass
class StackShards:
    """The shards that the layers of one stack attend to: its own, and those of the encoder if it is a decoder.

    ids: the whole input_ids, if the batch has any.
    padded: whether the whole ids of (this stack, the encoder) hold padding, which a model may mask by itself.
    buckets: of the relative position bias of its layers, set when the first layer is called.
    """

    own: Shards
    cross: Shards | None
    ids: Tensor | None
    name: str
    padded: tuple[bool, bool] = (False, False)
    buckets: tuple[Bucket, ...] = ()
    calls: set[str] = field(default_factory=set)  # kinds of attention that ran here
    plans: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, position_bias: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention of a layer. q, k, v: (batch, rows, heads, head_dim); mask: `MaskInfo`; options: scale, softcap, sinks."""
        band = distance_band(mask)
        crosses = self.cross is not None and band == Band()
        shards = self.cross if self.cross is not None and crosses else self.own
        problem = self._problem(module, band, crosses, q, k) or self._unsupported_bias(module, crosses, position_bias, options)
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
            scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
            out = relative_attention(q, k, v, position_bias, plans, key_bias=key_bias, scale=scale, group=shards.group)
        return torch.cat([out, out.new_zeros(len(out), surplus, *out.shape[2:])], dim=1) if surplus else out

    def _problem(self, module: nn.Module, band: Band, crosses: bool, q: Tensor, k: Tensor) -> str | None:
        """The reason why this layer does not fit its stack, or None."""
        layer, is_causal = type(module).__name__, getattr(module, "is_causal", band.right == 0)
        if is_causal != (band.right == 0):
            return f"{layer} has is_causal={is_causal} and a mask that keeps distances {band.left} to {band.right}"
        if self.cross is not None and not crosses and band.right != 0:
            return f"{layer} of the decoder asks for distances {band.left} to {band.right}, neither causal nor all keys"
        shards = self.cross if self.cross is not None and crosses else self.own
        rank = group_and_rank(shards.group, shards.layout.world)[1]
        rows, keys = (max(layout.rows(rank), 1) for layout in (shards.layout, shards.layout.of_keys))
        if (q.shape[1], k.shape[1]) != (rows, keys):
            return f"{layer} attends from {q.shape[1]} to {k.shape[1]} rows; of its sequences this rank has {rows} and {keys}"
        return None

    def _unsupported_bias(
        self, module: nn.Module, crosses: bool, position_bias: Tensor | None, options: dict[str, Any]
    ) -> str | None:
        """The reason why this layer's position bias is not supported, or None. A table of buckets has 2 dimensions."""
        if position_bias is None or not position_bias.numel():
            return None
        if position_bias.ndim != 2 or not self.buckets:
            return (
                f"{type(module).__name__} brings a position bias of shape {tuple(position_bias.shape)}, of this rank's rows; "
                "ringattn supports the relative bias of layers that compute it by compute_bias from an embedding, like T5's"
            )
        others = [name for name, option in options.items() if name != "scale" and option is not None]
        if crosses or others:
            return f"{type(module).__name__} has a position bias {'across stacks' if crosses else 'and ' + ', '.join(others)}"
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
        """Plans of all buckets that a layer with this mask sees, each a ring, since a narrow band moves few rows."""
        key = (q.shape[2:], k.shape[2], cast_dtype(q), band)
        if key not in self.plans:
            reached = [bucket for bucket in self.buckets if bucket.left <= band.right and bucket.right >= band.left]
            within = [b._replace(left=max(b.left, band.left), right=min(b.right, band.right)) for b in reached]
            self.plans[key] = plans_for(within, lambda mask: self._plan(shards, q, k, False, mask, schedule="ring"))
        plans: tuple[BiasedPlan, ...] = self.plans[key]
        return plans


def _key_bias(shards: Shards, padding: Tensor | None, padded: bool, k: Tensor) -> Tensor | None:
    """The bias that hides padding: from the batch's attention_mask, or else from a mask that the model made from ids.

    padded: the same on all ranks, so that all have a bias or none.
    """
    if shards.key_bias is not None or not padded:
        if padding is not None:
            raise InputError(PADDED_BY_ITSELF)
        return shards.key_bias
    bias = torch.zeros(k.shape[:2], device=k.device)
    return bias if padding is None else bias.masked_fill(~padding[:, : k.shape[1]].to(k.device), -torch.inf)


def _without_surplus(x: Tensor, layout: Any, shards: Shards) -> tuple[Tensor, int]:
    """Drops the extra row that a rank without rows has; returns also the number of dropped rows."""
    rows = layout.rows(group_and_rank(shards.group, layout.world)[1])
    return x[:, :rows], x.shape[1] - rows


def distance_band(mask: Any) -> Band:
    """Evaluates transformers' mask function for the distances (key minus query) that it keeps; mask: `MaskInfo`.

    Raises `InputError` for a mask that is no band.
    """
    far = 2 * (mask.window or 1) + 2
    zero = torch.zeros((), dtype=torch.int64)
    kept = mask.function(zero, zero, zero + far, torch.arange(2 * far + 1)).expand(2 * far + 1)
    distances = (kept.nonzero().flatten() - far).tolist()
    if not distances or len(distances) != distances[-1] - distances[0] + 1:
        raise InputError("the mask function of this model keeps no run of distances, which ringattn cannot shard over ranks")
    first, last = distances[0], distances[-1]
    return Band(-END if first == -far else first, END if last == far else last)


@contextmanager
def on_stacks(model: Any, shards: Any) -> Iterator[None]:
    """Passes their shards to the encoder and decoder of `model` within the context; has no effect on other models."""
    handles = hook_stacks(model, shards) if isinstance(shards, DecoderShards) else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_stacks(model: Any, shards: DecoderShards) -> list[Any]:
    """Installs hooks on the stacks of `model`, to be removed after its call. Raises `InputError` on every rank."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    problem = unsupported_stacks(model, encoder, decoder)
    group, _ = group_and_rank(shards.group, shards.layout.world)
    if problem or not torch.compiler.is_compiling():
        agree(group, {"call": "an encoder-decoder model"}, problem)
    source, target = (
        has_padding(ids, getattr(stack, "config", model.config))
        for ids, stack in zip(shards.ids, (encoder, decoder), strict=True)
    )
    stacks = (
        (encoder, StackShards(shards.encoder, None, shards.ids[0], "encoder", (source, source))),
        (decoder, StackShards(shards, shards.cross, shards.ids[1], "decoder", (target, source))),
    )
    handles: list[Any] = []
    for stack, stack_shards in stacks:
        handles.append(stack.register_forward_pre_hook(_PassShards(stack_shards), with_kwargs=True))
        handles.append(stack.register_forward_hook(_CheckCalls(stack_shards)))
        for module in embed_positions(stack):
            whole = WholePositions(stack_shards.own, stack_shards.ids)
            handles.append(module.register_forward_pre_hook(whole.before, with_kwargs=True))
            handles.append(module.register_forward_hook(whole.after))
        for module in stack.modules():
            return_bias_table(module)
    return handles


def unsupported_stacks(model: Any, encoder: Any, decoder: Any) -> str | None:
    """The reason why the stacks of this model cannot run on shards, or None."""
    name = type(model).__name__
    if model in (encoder, decoder) or encoder is decoder:
        return f"{name} has no separate encoder and decoder for ringattn to shard"
    for module in (model, encoder, decoder):
        kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return (
                f"the forward of {type(module).__name__} passes no further arguments on to its layers, so their attention "
                "cannot run in ringattn; use a model whose attention goes through transformers' AttentionInterface"
            )
    if model.base_model is not model and model.get_output_embeddings() is None:
        return (
            f"{name} has a head of another kind than a vocabulary's, which may pool over rows, and a rank has only its own. "
            "Use ringattn.integrations.transformers.forward_whole(model, batch, group), which runs it on the whole sequence"
        )
    for stack in (encoder, decoder):
        dropped = getattr(stack, "layerdrop", 0.0)
        if stack.training and dropped:
            return (
                f"{type(stack).__name__} leaves out layers at random (layerdrop={dropped}), different ones on each rank; set "
                "config.encoder_layerdrop and config.decoder_layerdrop to 0"
            )
        for module in stack.modules():
            if hasattr(module, "expert_capacity"):
                return (
                    f"{type(module).__name__} has experts of limited capacity, which the tokens of the sequence fill in "
                    "order: which of this rank's tokens fit depends on those of other ranks. Use a model without"
                )
    return None


class _PassShards:
    """Passes its shards to a stack."""

    def __init__(self, stack_shards: StackShards) -> None:
        self.stack_shards = stack_shards

    def __call__(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.stack_shards.calls.clear()
        return args, kwargs | {"ringattn": self.stack_shards}


class _CheckCalls:
    """Checks that the attention of a stack ran in ringattn."""

    def __init__(self, stack_shards: StackShards) -> None:
        self.stack_shards = stack_shards

    def __call__(self, stack: nn.Module, args: Any, outputs: Any) -> None:
        expected = {"self"} if self.stack_shards.cross is None else {"self", "cross"}
        if missing := expected - self.stack_shards.calls:
            raise InputError(
                f"{' and '.join(sorted(missing))} attention of {type(stack).__name__} did not come to ringattn: this model "
                "computes it by itself, on this rank's rows alone; use a model whose attention goes through transformers' "
                "AttentionInterface"
            )
