"""Runs attention on batches that reach the ranks already sharded, as in DeepSpeed jobs.

A rank holds a contiguous part of the sequence and its `position_ids`. With the first layer of a forward the ranks of a sequence
gather positions and padding to make the `Shards`; later layers, and recomputed ones, find them by the `position_ids` tensor.
The cache holds no entry longer than that tensor lives.

Since no `Shards` are passed to the model, the outermost called model is checked when attention ran on shards within its call:
outputs that are not of this rank's rows are refused, see `outputs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ringattn.comm.collectives import all_gather
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import device_of
from ringattn.errors import InputError
from ringattn.faults.watchdog import comm_errors
from ringattn.integrations.transformers.attention_interface import NAME
from ringattn.integrations.transformers.batch import Shards, documents_of, padding_of
from ringattn.integrations.transformers.layers import MaskInfo, attend, describe_mask
from ringattn.integrations.transformers.outputs import agree_on_rows
from ringattn.integrations.transformers.served import Served
from ringattn.integrations.transformers.support.rowwise import Probe
from ringattn.integrations.transformers.support.trial import try_rows
from ringattn.integrations.transformers.support.unsupported import unsupported_balance, unsupported_model
from ringattn.plan.plan import Plan
from ringattn.sequence.layout import Layout, Span
from ringattn.sequence.mask import causal

HINT = (
    "Let the model return logits of its rows (no labels, no logits_to_keep, no output_router_logits) and compute the loss with "
    "ringattn.integrations.deepspeed.sp_loss(logits, shift_labels, engine). Rewards, classes of sequences and load-balancing "
    "losses need ringattn.integrations.transformers.forward_whole(model, batch, group) or ringattn.integrations.trainer, with "
    "DDP or FSDP instead of DeepSpeed"
)


class LastUsed:
    """Records the `Shards` that attention used since the outermost model of transformers was called, or None."""

    def __init__(self) -> None:
        self.shards: Shards | None = None
        self.within = False

    def note(self, shards: Shards) -> None:
        if self.within:  # false where a layer is recomputed in backward
            self.shards = shards


def check_outputs_of(used: LastUsed) -> None:
    """Makes every model of transformers check its outputs if attention set `used.shards` within its call."""
    call: Callable[..., Any] = PreTrainedModel.__call__

    @wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if used.within:  # inner models may return anything to the outermost
            return call(self, *args, **kwargs)
        used.shards, used.within = None, True
        try:
            outputs = call(self, *args, **kwargs)
        finally:
            used.within = False
        if used.shards is not None:
            agree_on_rows(outputs, used.shards, type(self).__name__, HINT)
            used.shards = None
        return outputs

    PreTrainedModel.__call__ = checked  # type: ignore[method-assign]


POSITIONS = (
    "pass position_ids (batch or 1, rows) with every forward: this rank's part of those of the whole sequence, "
    "torch.arange(seq_len) sharded like input_ids, restarting with each packed document"
)


def replace_attention(
    model: Any,
    name: str,
    group: dist.ProcessGroup,
    make: Callable[..., Plan],
    shape: tuple[int, int | None],
    disable_in_eval: bool,
    refused: Callable[[], str | None],
) -> None:
    """Replaces transformers' attention and mask function `name` by attention on shards, for the layers of `model`.

    Layers of other models, and other towers of this one, keep the original. Raises `InputError`.
    """
    config = model.config if hasattr(model, "config") else AutoConfig.from_pretrained(model)
    used = getattr(config, "_attn_implementation", None)
    if hasattr(model, "config") and used not in (None, name):
        raise InputError(f"core_attn_implementation={name!r}, and the model uses {used!r}: pass the same name")
    if name not in ALL_ATTENTION_FUNCTIONS and name != "eager":
        raise InputError(
            f"core_attn_implementation={name!r} is none of {', '.join(sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()))}"
        )
    problem = unsupported_balance({}, config.get_text_config()) or unsupported_model(config.get_text_config(), 0)
    if name == "eager":
        problem = "'eager' is a function of each model and cannot be replaced; load the model with 'sdpa'"
    if getattr(config, "is_encoder_decoder", False):
        problem = (
            f"{config.model_type} has an encoder and a decoder, whose rows position_ids do not distinguish; use "
            "ringattn.integrations.transformers.shard_batch, or ringattn.integrations.trainer"
        )
    if problem:
        raise InputError(problem)
    served = Served(model, config)
    shard_cache = ShardCache(group, config.get_text_config(), make, shape, refused)
    used = LastUsed()
    check_outputs_of(used)
    try_models_of(served, group, disable_in_eval)
    core, mask_of_core = ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any) -> Any:
        if isinstance(rest.get(NAME), Probe):
            return attend(module, query, key, value, _info(attention_mask), **rest)
        ours = served.layer(module, rest.get("position_ids"))
        if not ours or (disable_in_eval and not module.training):
            deferred = isinstance(attention_mask, partial) and attention_mask.func is mask_of_core
            mask = attention_mask() if deferred else attention_mask
            return core(module, query, key, value, mask, **rest)
        shards = shard_cache.shards(rest.get("position_ids"), attention_mask, len(query), query.shape[2])
        used.note(shards)
        info = _info(attention_mask)
        info = info._replace(tokens=None) if isinstance(info, MaskInfo) else info  # `shards` has the padding
        return attend(module, query, key, value, info, ringattn=shards, **rest)

    def mask(**kwargs: Any) -> Any:  # deferred to the layer: only there is known whether the module trains
        return partial(mask_of_core, **kwargs) if served.mask(kwargs.get("config")) else mask_of_core(**kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention  # not register(): an earlier entry of DeepSpeed would take precedence
    ALL_MASK_ATTENTION_FUNCTIONS[name] = mask


def try_models_of(served: Served, group: dist.ProcessGroup, disable_in_eval: bool) -> None:
    """Makes every model whose layers are served run a trial before its first call, see `trial`."""
    call: Callable[..., Any] = PreTrainedModel.__call__

    @wraps(call)
    def tried(model: Any, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        own = NAME in kwargs or torch.compiler.is_compiling() or (disable_in_eval and not model.training)
        if not own and isinstance(positions, Tensor) and served.model(model, positions):
            arguments = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs
            try_rows(model, arguments, positions.shape[-1], group)
        return call(model, *args, **kwargs)

    PreTrainedModel.__call__ = tried  # type: ignore[method-assign]


def _info(mask: Any) -> Any:
    """The `MaskInfo` of a deferred mask; None and other masks are returned unchanged, and `attend` refuses them."""
    if not isinstance(mask, partial):
        return mask
    tokens = mask.keywords.get("attention_mask")
    return describe_mask(**mask.keywords | {"attention_mask": None})._replace(tokens=tokens, own=mask)


@dataclass
class ShardCache:
    """Finds the `Shards` of a forward by its position_ids; collective over `group` when they are new.

    shape: sequences per batch, and the sequence length if that is fixed.
    refused: returns the reason why the job is not supported, or None.
    """

    group: dist.ProcessGroup
    text: PretrainedConfig
    make: Callable[..., Plan]
    shape: tuple[int, int | None]
    refused: Callable[[], str | None]
    known: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def shards(self, position_ids: Tensor | None, mask: Any, batch: int, rows: int) -> Shards:
        info = _info(mask)
        tokens = info.tokens if isinstance(info, MaskInfo) else None
        if position_ids is not None and position_ids in self.known:
            version, before, shards = self.known[position_ids]
            same = before is tokens or (before is not None and tokens is not None and torch.equal(before, tokens))
            if version == position_ids._version and same:
                return shards  # type: ignore[no-any-return]
        agree(self.group, {"call": "positions of a batch", "batch": batch}, self._problem(position_ids, tokens, batch, rows))
        assert position_ids is not None  # else all ranks have raised
        shards = self._gather(position_ids, tokens, batch)
        self.known[position_ids] = position_ids._version, tokens, shards
        return shards

    def _problem(self, position_ids: Tensor | None, tokens: Tensor | None, batch: int, rows: int) -> str | None:
        if problem := self.refused():
            return problem
        if position_ids is None:
            return f"attention was called without position_ids; {POSITIONS}"
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != rows:
            return f"position_ids has shape {tuple(position_ids.shape)} for {batch} sequences of {rows} rows; {POSITIONS}"
        if batch != self.shape[0]:
            return f"the batch has {batch} sequences; register_with_transformers was given micro_batch_size={self.shape[0]}"
        if tokens is not None and tuple(tokens.shape) != (batch, rows):
            return f"attention_mask has shape {tuple(tokens.shape)}; pass this rank's part of it, ({batch}, {rows})"
        return None

    def _gather(self, position_ids: Tensor, tokens: Tensor | None, batch: int) -> Shards:
        present = torch.ones_like(position_ids) if tokens is None else tokens.to(position_ids)
        own_rows = torch.stack([position_ids.expand(batch, -1), present.expand(batch, -1)]).long()
        parts = _gather_last_dim(own_rows.to(device_of(self.group)), self.group)
        counts = [part.shape[2] for part in parts]
        ends = list(accumulate(counts))
        positions, present = torch.cat(parts, dim=2)
        length, rank = ends[-1], dist.get_rank(self.group)
        bias = padding_of(present, positions)
        problem = self._wrong(parts, length) or unsupported_model(self.text, length)
        if problem:  # of gathered values, so it is the same on all ranks
            raise InputError(problem)
        layout = Layout("contiguous", tuple((Span(end - n, n),) for n, end in zip(counts, ends, strict=True)))
        own = None if bias is None else bias[:, ends[rank] - counts[rank] : ends[rank]].to(position_ids.device)
        mask = documents_of(positions.cpu(), tokens is not None) if bias is None else causal()
        return Shards(layout, mask, partial(self.make, length, layout=layout), self.group, own)

    def _wrong(self, parts: list[Tensor], length: int) -> str | None:
        if self.shape[1] not in (None, length):
            return f"the ranks hold {length} rows together; register_with_transformers was given seq_length={self.shape[1]}"
        if len(parts) > 1 and all((part[0] == torch.arange(part.shape[2], device=part.device)).all() for part in parts):
            return (
                "position_ids begin at 0 on every rank, as a model makes them that is given none: each rank would be a "
                f"document of its own; {POSITIONS}. Documents exactly as long as a rank's part need no sequence parallelism"
            )
        return None


def _gather_last_dim(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """All-gathers `own`; the last dimension may differ between ranks."""
    world = dist.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=own.device) for _ in range(world)]
    with comm_errors("gathering whole sequences", f"rank {dist.get_rank(group)}: gathering whole sequences failed"):
        all_gather(counts, torch.tensor([own.shape[-1]], device=own.device), group)
        most = max(int(count) for count in counts)
        padded = nn.functional.pad(own, (0, most - own.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(world)]
        all_gather(parts, padded, group)
    return [part[..., : int(count)] for part, count in zip(parts, counts, strict=True)]
