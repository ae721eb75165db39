"""Refuses what a model makes of one rank's rows alone, where batches come to the ranks already cut.

DeepSpeed's jobs hand no `Shards` to the model: its first layer makes them, or finds them. So the outermost model that was
called is checked if attention on shards ran within its call. See `rows` for how results are recognised, and why.

Shards of a batch that came to the ranks already cut: each says its positions, once per forward, and learns the whole.

This is how DeepSpeed's jobs come: a rank's part of the sequence, parts one behind another, `position_ids` beside it. The ranks
of a sequence gather positions and padding with the first layer of a forward, and later layers (and recomputed ones) find the
`Shards` by the `position_ids` they are given. Nothing outlives that tensor.
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
    "Let the model return logits of its rows (no labels, no logits_to_keep, no output_router_logits) and make the loss with "
    "ringattn.integrations.deepspeed.sp_loss(logits, shift_labels, engine). Rewards, classes of sequences and load-balancing "
    "losses need ringattn.integrations.transformers.forward_whole(model, batch, group) or ringattn.integrations.trainer, with "
    "DDP or FSDP in DeepSpeed's place"
)


class LastUsed:
    """The `Shards` that attention has used since the outermost model of transformers was called, or None."""

    def __init__(self) -> None:
        self.shards: Shards | None = None
        self.within = False

    def note(self, shards: Shards) -> None:
        if self.within:  # not where a layer is recomputed in backward
            self.shards = shards


def check_outputs_of(used: LastUsed) -> None:
    """Let every model of transformers, in whose call attention sets `used.shards`, check that it returns its rows."""
    call: Callable[..., Any] = PreTrainedModel.__call__

    @wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if used.within:  # models within the outermost return what they like to it
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
    "pass position_ids (batch or 1, rows) with every forward: this rank's part of the whole sequence's, "
    "torch.arange(seq_len) cut like input_ids, beginning anew where a packed document does"
)


def take_place(
    model: Any,
    name: str,
    group: dist.ProcessGroup,
    make: Callable[..., Plan],
    shape: tuple[int, int | None],
    disable_in_eval: bool,
    refused: Callable[[], str | None],
) -> None:
    """Put attention over gathered shards where transformers has `name`, attention and mask, for the layers of `model`.

    Layers of other models, and towers beside the text of this one, keep what they had. Raises `InputError`.
    """
    config = model.config if hasattr(model, "config") else AutoConfig.from_pretrained(model)
    used = getattr(config, "_attn_implementation", None)
    if hasattr(model, "config") and used not in (None, name):
        raise InputError(
            f"core_attn_implementation={name!r}, and the model uses {used!r}: pass the same, so that ringattn takes its place"
        )
    if name not in ALL_ATTENTION_FUNCTIONS and name != "eager":
        raise InputError(
            f"core_attn_implementation={name!r} is none of {', '.join(sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()))}"
        )
    problem = unsupported_balance({}, config.get_text_config()) or unsupported_model(config.get_text_config(), 0)
    if name == "eager":
        problem = "'eager' is a function of each model, whose place cannot be taken; load the model with 'sdpa'"
    if getattr(config, "is_encoder_decoder", False):
        problem = (
            f"{config.model_type} has an encoder and a decoder, whose rows position_ids do not distinguish; use "
            "ringattn.integrations.transformers.shard_batch, or ringattn.integrations.trainer"
        )
    if problem:
        raise InputError(problem)
    served = Served(model, config)
    whole = ShardCache(group, config.get_text_config(), make, shape, refused)
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
        shards = whole.shards(rest.get("position_ids"), attention_mask, len(query), query.shape[2])
        used.note(shards)
        info = _info(attention_mask)
        info = info._replace(tokens=None) if isinstance(info, MaskInfo) else info  # padding is known to `shards`
        return attend(module, query, key, value, info, ringattn=shards, **rest)

    def mask(**asked: Any) -> Any:  # which of both is known only in the layer, where the module says whether it trains
        return partial(mask_of_core, **asked) if served.mask(asked.get("config")) else mask_of_core(**asked)

    ALL_ATTENTION_FUNCTIONS[name] = attention  # not register(): what DeepSpeed put there before would go first
    ALL_MASK_ATTENTION_FUNCTIONS[name] = mask


def try_models_of(served: Served, group: dist.ProcessGroup, disable_in_eval: bool) -> None:
    """Let every model whose layers are served be tried before its first call, see `trial`."""
    call: Callable[..., Any] = PreTrainedModel.__call__

    @wraps(call)
    def tried(model: Any, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        own = NAME in kwargs or torch.compiler.is_compiling() or (disable_in_eval and not model.training)
        if not own and isinstance(positions, Tensor) and served.model(model, positions):
            given = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs
            try_rows(model, given, positions.shape[-1], group)
        return call(model, *args, **kwargs)

    PreTrainedModel.__call__ = tried  # type: ignore[method-assign]


def _info(asked: Any) -> Any:
    """What a layer's mask says, and None or what was made by hand as they are: `attend` refuses those."""
    if not isinstance(asked, partial):
        return asked
    tokens = asked.keywords.get("attention_mask")
    return describe_mask(**asked.keywords | {"attention_mask": None})._replace(tokens=tokens, own=asked)


@dataclass
class ShardCache:
    """Finds the `Shards` of a forward by its position_ids; collective over `group` when they are new.

    shape: sequences per batch, and the length of the whole one if that is fixed.
    refused: what is wrong with the job as a whole, or None.
    """

    group: dist.ProcessGroup
    text: PretrainedConfig
    make: Callable[..., Plan]
    shape: tuple[int, int | None]
    refused: Callable[[], str | None]
    known: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def shards(self, position_ids: Tensor | None, asked: Any, batch: int, rows: int) -> Shards:
        info = _info(asked)
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
            return f"attention came without position_ids; {POSITIONS}"
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != rows:
            return f"position_ids has shape {tuple(position_ids.shape)} for {batch} sequences of {rows} rows; {POSITIONS}"
        if batch != self.shape[0]:
            return f"the batch has {batch} sequences; register_with_transformers was told micro_batch_size={self.shape[0]}"
        if tokens is not None and tuple(tokens.shape) != (batch, rows):
            return f"attention_mask has shape {tuple(tokens.shape)}; pass this rank's part of it, ({batch}, {rows})"
        return None

    def _gather(self, position_ids: Tensor, tokens: Tensor | None, batch: int) -> Shards:
        there = torch.ones_like(position_ids) if tokens is None else tokens.to(position_ids)
        mine = torch.stack([position_ids.expand(batch, -1), there.expand(batch, -1)]).long()
        parts = _of_all(mine.to(device_of(self.group)), self.group)
        counts = [part.shape[2] for part in parts]
        ends = list(accumulate(counts))
        positions, real = torch.cat(parts, dim=2)
        length, rank = ends[-1], dist.get_rank(self.group)
        bias = padding_of(real, positions)
        problem = self._wrong(parts, length) or unsupported_model(self.text, length)
        if problem:  # of what all ranks know alike
            raise InputError(problem)
        layout = Layout("contiguous", tuple((Span(end - n, n),) for n, end in zip(counts, ends, strict=True)))
        own = None if bias is None else bias[:, ends[rank] - counts[rank] : ends[rank]].to(position_ids.device)
        mask = documents_of(positions.cpu(), tokens is not None) if bias is None else causal()
        return Shards(layout, mask, partial(self.make, length, layout=layout), self.group, own)

    def _wrong(self, parts: list[Tensor], length: int) -> str | None:
        if self.shape[1] not in (None, length):
            return f"the ranks hold {length} rows together; register_with_transformers was told seq_length={self.shape[1]}"
        if len(parts) > 1 and all((part[0] == torch.arange(part.shape[2], device=part.device)).all() for part in parts):
            return (
                "position_ids begin at 0 on every rank, as a model makes them that is given none: each rank would be a "
                f"document of its own; {POSITIONS}. Documents exactly as long as a rank's part need no sequence parallelism"
            )
        return None


def _of_all(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """`mine` of every rank; the last dimension may differ."""
    world = dist.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=mine.device) for _ in range(world)]
    with comm_errors("gathering whole sequences", f"rank {dist.get_rank(group)}: gathering whole sequences failed"):
        all_gather(counts, torch.tensor([mine.shape[-1]], device=mine.device), group)
        most = max(int(count) for count in counts)
        padded = nn.functional.pad(mine, (0, most - mine.shape[-1])).contiguous()
        whole = [torch.empty_like(padded) for _ in range(world)]
        all_gather(whole, padded, group)
    return [part[..., : int(count)] for part, count in zip(whole, counts, strict=True)]
