"""Shards a batch of a single process for one rank, and collects what attention must know about the whole sequence.

A model on a rank sees its own rows only. Everything that depends on the whole sequence is therefore determined before sharding:
positions, documents, padding of keys, and the next token of the last row (labels are shifted first). One object, `Shards`,
carries it to each attention layer and makes a plan for the heads, dtype and window of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.execution.attention import attention, cast_dtype
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers.support.unsupported import OF_FLASH_ATTENTION
from ringattn.nn.loss import IGNORE, shift_labels
from ringattn.plan.plan import Plan
from ringattn.sequence.layout import Layout
from ringattn.sequence.mask import END, Band, Mask, Rect, bidirectional_blocks, causal, documents, sliding_window

LEFT_OUT = ("attention_mask", *OF_FLASH_ATTENTION)  # `Shards` have padding and document boundaries

Bounds = tuple[tuple[int, int], ...]  # start and stop of each block of one sequence, in global positions


class ImageBlocks(NamedTuple):
    """Blocks of tokens that see each other in both directions, by sequence of a batch: images within causal text.

    under_window: whether a layer's window also hides keys of the same block, as in Gemma 3.
    """

    bounds: tuple[Bounds, ...]
    under_window: bool = False


@dataclass
class Shards:
    """A sequence on the ranks of `group`: its layout and its attention.

    mask: of the whole sequence, without windows of single layers.
    make: `make_plan` with the arguments that layers have in common, the layout included.
    key_bias: (batch, rows), 0 or -inf where a key is padding; None where none is.
    check_outputs: whether outputs of the model are checked to be of this rank's rows, see `outputs`.
    assumed: how missing positions were made, "counted" or "counted, left padding"; None if the batch has positions.
    packed: whether there are documents, which the model's own masks must then separate.
    blocks: tokens that see each other in both directions, by the window of the layer; empty where there are none.
    """

    layout: Layout
    mask: Mask
    make: Callable[..., Plan]
    group: Group | None = None
    key_bias: Tensor | None = None
    check_outputs: bool = True
    assumed: str | None = None
    packed: bool = False
    blocks: Mapping[int | None, ImageBlocks | None] = field(default_factory=dict)
    plans: dict[tuple[object, ...], Plan] = field(default_factory=dict)  # cached, also for torch.compile

    def plan(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        window: int | None = None,
        bounds: Bounds = (),
        under_window: bool = False,
    ) -> Plan:
        """The plan of layers with these heads that see `window` keys each, the query's own included, or all before them."""
        key = (heads, kv_heads, head_dim, dtype, window, bounds, under_window)
        if key not in self.plans:
            mask = with_blocks(self.mask, window, bounds, under_window)
            self.plans[key] = self.make(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, mask=mask)
        return self.plans[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, **options: Any) -> Tensor:
        """`ringattn.attention` over these shards. q, k, v as there; `options`: scale, softcap, sinks.

        Raises `InputError` for a layer with a window for which the model made no mask.
        """
        if self.blocks and window not in self.blocks:
            raise InputError(f"a layer asks for sliding_window={window}, and the model made masks for {list(self.blocks)}")
        blocks = self.blocks.get(window)
        if blocks is None or len(set(blocks.bounds)) == 1:
            bounds, under = (blocks.bounds[0], blocks.under_window) if blocks else ((), False)
            return self._attend(q, k, v, self.key_bias, window, bounds, under, options)
        bias = [None] * len(q) if self.key_bias is None else self.key_bias.split(1)
        sequences = zip(q.split(1), k.split(1), v.split(1), bias, blocks.bounds, strict=True)
        under = blocks.under_window
        return torch.cat([self._attend(*qkv, b, window, bounds, under, options) for *qkv, b, bounds in sequences])  # type: ignore[call-arg]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        window: int | None,
        bounds: Bounds,
        under_window: bool,
        options: Mapping[str, Any],
    ) -> Tensor:
        plan = self.plan(q.shape[2], k.shape[2], q.shape[3], cast_dtype(q), window, bounds, under_window)
        surplus = q.shape[1] if self.rows == 0 else 0  # the row that `cut` gives to a rank without rows
        if surplus:
            q, k, v = (x[:, :0] for x in (q, k, v))
        out: Tensor = attention(q, k, v, plan, key_bias=key_bias, group=self.group, **options)
        return torch.cat([out, out.new_zeros(len(out), surplus, *out.shape[2:])], dim=1) if surplus else out

    @property
    def rows(self) -> int:
        """The number of rows of the sequence on this rank."""
        return self.layout.rows(group_and_rank(self.group, self.layout.world)[1])


def windowed(mask: Mask, window: int | None) -> Mask:
    """Restricts `mask` to `window` keys, the query's own included: transformers counts it, flash-attn does not."""
    return mask if window is None else mask & sliding_window(window - 1)


def with_blocks(mask: Mask, window: int | None, bounds: Bounds, under_window: bool = False) -> Mask:
    """Adds blocks: (`mask` and window) or same block; with `under_window` (`mask` or same block) and window."""
    if not bounds:
        return windowed(mask, window)
    if not under_window or window is None:
        return bidirectional_blocks(bounds, windowed(mask, window))
    before = Mask(f"window({window - 1},)", (Rect(0, END, 0, END, Band(left=1 - window)),))
    return bidirectional_blocks(bounds, mask) & before


def text_positions(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None:
    """Returns the positions (batch or 1, seq_len) that separate documents, or None where there are none.

    Models whose rotary positions count frames, rows and columns of images take (3, batch, seq_len), which do not separate
    documents, or (4, batch, seq_len), of which the first are positions in the text.

    Raises `InputError` for another shape, or where (3, batch, seq_len) restart as with a document.
    """
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    if position_ids.ndim == 3 and len(position_ids) == 4:
        return position_ids[0]
    if position_ids.ndim != 3 or len(position_ids) != 3:
        raise InputError(
            f"position_ids has shape {tuple(position_ids.shape)}; pass (batch, seq_len), or of a model whose positions count "
            "frames, rows and columns (3, batch, seq_len), or (4, batch, seq_len) with positions in the text first"
        )
    before, after = position_ids[..., :-1], position_ids[..., 1:]
    begins = (after == 0).all(0) & (before > 0).any(0)  # an image continues after the preceding positions in all three
    if attention_mask is not None:
        begins = begins & (attention_mask[:, 1:] * attention_mask[:, :-1]).bool().to(begins.device)
    if begins.any():
        raise InputError(
            "position_ids of shape (3, batch, seq_len) restart at 0, and models read no documents from them: put positions "
            "in the text, which restart with each document, in front, as (4, batch, seq_len)"
        )
    return None


def documents_of(position_ids: Tensor, masked: bool = False) -> Mask:
    """Makes the causal mask of packed documents: one begins where positions do not increase.

    Args:
        position_ids: int64 (batch or 1, seq_len), of the whole sequence.
        masked: whether the batch has an attention_mask. Without one, transformers' own attention begins a document also where
            positions jump forward; with one it does not.

    Raises:
        InputError: the rows of a batch are packed differently, or positions jump forward without an attention_mask.
    """
    step = position_ids[:, 1:] - position_ids[:, :-1]
    if not masked and (step > 1).any():
        raise InputError(
            "position_ids jump forward by more than 1 and the batch has no attention_mask, which transformers' backends read "
            "differently: pass attention_mask=torch.ones_like(input_ids) for one sequence with a gap in its positions, or let "
            "positions restart at 0 where a document begins"
        )
    begins = step <= 0
    if (begins != begins[:1]).any():
        raise InputError(
            "position_ids: the sequences of this batch are packed differently, and one call has one mask; put one sequence "
            "into each batch, or pack all documents into one long sequence"
        )
    starts = (begins[0].nonzero().flatten() + 1).tolist()
    return documents((0, *starts, position_ids.shape[1])) if starts else causal()


def padding_of(attention_mask: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """Makes key_bias (batch, seq_len), fp32, -inf on padding; None without padding. attention_mask: 1 or True is a token.

    Raises `InputError` where a sequence has both padding and documents.
    """
    tokens = attention_mask.bool()
    if tokens.all():
        return None
    if position_ids is not None and any(_restarts(p, t) for p, t in zip(position_ids.expand_as(tokens), tokens, strict=True)):
        raise InputError(
            "attention_mask has padding and position_ids restart between tokens: a batch is either padded or packed; "
            "leave the padding out of a packed batch, or give each document a sequence of its own"
        )
    return torch.zeros(tokens.shape).masked_fill(~tokens.cpu(), float("-inf")).to(tokens.device)


def _restarts(positions: Tensor, tokens: Tensor) -> bool:
    """Whether positions of one sequence, without padding, fail to increase somewhere."""
    of_tokens = positions[tokens.to(positions.device)]
    return bool((of_tokens[1:] <= of_tokens[:-1]).any())


def cut(batch: Mapping[str, Any], layout: Layout, rank: int) -> tuple[dict[str, Any], Tensor | None]:
    """Takes the rows of `rank` of every tensor (batch, seq_len, ...), and its targets if the batch has labels.

    Missing positions are made, since a model would start them at 0 on every rank. The attention_mask is left out: padding is in
    `Shards.key_bias`, and targets of padding are ignored. A rank without rows gets the first row, since models of transformers
    fail without rows: `Shards.attend` drops it, and its target is ignored.
    """
    rows = resident_positions(layout, rank)
    empty = len(rows) == 0
    if empty:
        rows = torch.zeros(1, dtype=torch.int64)
    whole = {"position_ids": torch.arange(layout.length).unsqueeze(0)}
    whole |= {name: value for name, value in batch.items() if name not in LEFT_OUT and value is not None}
    if "labels" in whole:
        whole["labels"] = shift_labels(whole["labels"], IGNORE)
        if batch.get("attention_mask") is not None:  # with left padding the first token would be a target of padding
            whole["labels"] = whole["labels"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    own = {
        name: value.to(device).index_select(-1 if name == "position_ids" else 1, rows.to(device))
        if isinstance(value, Tensor) and value.ndim > 1
        else value
        for name, value in whole.items()
    }
    for name in ("labels", "shift_labels"):
        if empty and isinstance(own.get(name), Tensor):
            own[name] = torch.full_like(own[name], IGNORE)
    return own, own.pop("labels", None)
