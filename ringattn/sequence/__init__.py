"""Describes which positions each rank holds and which keys each query sees: masks, layouts, and segments per tile. No torch."""

from ringattn.sequence.document_layout import by_documents
from ringattn.sequence.layout import LAYOUTS, Layout, Span, take
from ringattn.sequence.mask import (
    END,
    Band,
    Mask,
    Rect,
    bidirectional_blocks,
    causal,
    documents,
    full,
    prefix_lm,
    sliding_window,
)
from ringattn.sequence.segments import Segment, tile_segments

__all__ = [
    "Band",
    "END",
    "LAYOUTS",
    "Layout",
    "Mask",
    "Segment",
    "Rect",
    "Span",
    "bidirectional_blocks",
    "by_documents",
    "causal",
    "documents",
    "full",
    "tile_segments",
    "prefix_lm",
    "sliding_window",
    "take",
]
