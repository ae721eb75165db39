"""Reads the meaning of transformers' mask functions: causal, windows, packed documents, bidirectional image blocks.

transformers builds masks from a few functions of (batch, head, query, key), joined by `and_masks` and `or_masks`, and passes
the result to the mask interface. The parts are recognised by their code objects, so no tensor of the size of a mask is made. An
unknown function is named, and refused by the callers. Functions:
https://github.com/huggingface/transformers/blob/main/src/transformers/masking_utils.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor
from transformers import masking_utils

from ringattn.errors import InputError
from ringattn.integrations.transformers.batch import ImageBlocks


class MaskReading(NamedTuple):
    """The meaning of a mask function.

    causal: whether keys after the query are hidden, except those of its block.
    window: keys that a query sees, its own included; None for all.
    packed: whether documents are separated; ringattn reads documents from positions.
    block_ids: int64 (batch, seq_len); rows with the same nonnegative number see each other.
    window_over_blocks: whether the window also applies within a block.
    unknown: the name of an unknown part, or None.
    """

    causal: bool = False
    window: int | None = None
    packed: bool = False
    block_ids: Tensor | None = None
    window_over_blocks: bool = False
    unknown: str | None = None


def read_mask(function: Any) -> MaskReading:
    """The meaning of a mask function of transformers."""
    if function is masking_utils.causal_mask_function:
        return MaskReading(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return MaskReading()
    name, values = _part(function)
    if name in ("and_masks", "or_masks"):
        parts = [read_mask(part) for part in values["mask_functions"]]
        return _all_of(parts) if name == "and_masks" else _any_of(parts)
    if name == "sliding_window_overlay":
        return MaskReading(window=values["sliding_window"])
    if name == "packed_sequence_mask_function":
        return MaskReading(packed=True)
    if name == "remap_positions_for_packed_sequence":
        inner = read_mask(values["mask_function"])
        return inner if inner.block_ids is None else inner._replace(unknown="image blocks in packed documents")
    if name == "blockwise_overlay":
        return MaskReading(block_ids=values["block_sequence_ids"])
    return MaskReading(unknown=name)


def blocks_of(reading: MaskReading, tokens: Tensor | None) -> ImageBlocks | None:
    """The bounds of the blocks of each sequence, or None where there are none.

    tokens: bool (batch, seq_len), False on padding, which belongs to no block.

    Raises `InputError` where a block is not contiguous.
    """
    if reading.block_ids is None:
        return None
    ids = reading.block_ids if tokens is None else reading.block_ids.masked_fill(~tokens.bool(), -1)
    bounds = tuple(_runs(sequence) for sequence in ids.cpu())
    return ImageBlocks(bounds, reading.window_over_blocks) if any(bounds) else None


def _runs(ids: Tensor) -> tuple[tuple[int, int], ...]:
    """Start and stop of every run of one nonnegative number. ids: (seq_len,)."""
    edges = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
    stops = [0, *edges.tolist(), len(ids)]
    runs = [(int(ids[a]), a, b) for a, b in pairwise(stops) if a < b and ids[a] >= 0]
    if len({number for number, _, _ in runs}) < len(runs):
        raise InputError(
            "a block of tokens that see each other in both directions is interrupted by other tokens; ringattn supports "
            "contiguous "
            "blocks: number the parts differently (token_type_ids), or run this batch in one process"
        )
    return tuple((start, stop) for _, start, stop in runs)


def _all_of(parts: Sequence[MaskReading]) -> MaskReading:
    with_blocks = [part for part in parts if part.block_ids is not None]
    others = [part for part in parts if part.block_ids is None]
    unknown = next((part.unknown for part in parts if part.unknown), None)
    if len(with_blocks) > 1 or (with_blocks and any(part.causal for part in others)):
        unknown = unknown or "image blocks cut off by another mask"
    windows = [part.window for part in parts if part.window is not None]
    return MaskReading(
        causal=any(part.causal for part in parts),
        window=min(windows, default=None) if windows else None,
        packed=any(part.packed for part in parts),
        block_ids=with_blocks[0].block_ids if with_blocks else None,
        window_over_blocks=any(part.window_over_blocks for part in parts)
        or bool(with_blocks and any(part.window is not None for part in others)),
        unknown=unknown,
    )


def _any_of(parts: Sequence[MaskReading]) -> MaskReading:
    """Recognises the union of blocks and one other mask."""
    blocks = [part for part in parts if part.block_ids is not None]
    others = [part for part in parts if part.block_ids is None]
    unknown = next((part.unknown for part in parts if part.unknown), None)
    if len(blocks) != 1 or len(others) != 1 or blocks[0] != MaskReading(block_ids=blocks[0].block_ids):
        return MaskReading(unknown=unknown or "a union of masks")
    return others[0]._replace(block_ids=blocks[0].block_ids, unknown=unknown)


def _part(function: Any) -> tuple[str, Mapping[str, Any]]:
    """The name and the closure of the transformers function that made this one, or the name of an unknown one."""
    code = getattr(function, "__code__", None)
    if code is None or code not in _MAKERS:
        return str(getattr(function, "__qualname__", function)), {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return _MAKERS[code], dict(zip(code.co_freevars, cells, strict=True))


def _code_within(maker: Callable[..., Any]) -> CodeType:
    """The code object of the function that `maker` returns; comprehensions within it are skipped."""
    codes = (constant for constant in maker.__code__.co_consts if isinstance(constant, CodeType))
    return next(code for code in codes if not code.co_name.startswith("<"))


_MAKERS: dict[CodeType, str] = {
    _code_within(getattr(masking_utils, name)): name
    for name in (
        *("and_masks", "or_masks", "sliding_window_overlay", "packed_sequence_mask_function"),
        *("remap_positions_for_packed_sequence", "blockwise_overlay", "chunked_overlay"),
    )
    if hasattr(masking_utils, name)
}
