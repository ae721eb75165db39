"""Says which positions each rank holds and which keys each query sees: masks, layouts, their join per tile. No torch."""

from ringattn.sequence.document_layout import by_documents
from ringattn.sequence.layout import LAYOUTS, Layout, Span, take
from ringattn.sequence.mask import Band, Mask, Rect, bidirectional_blocks, causal, documents, full, prefix_lm, sliding_window
from ringattn.sequence.segments import Piece, pieces

__all__ = [
    "Band",
    "LAYOUTS",
    "Layout",
    "Mask",
    "Piece",
    "Rect",
    "Span",
    "bidirectional_blocks",
    "by_documents",
    "causal",
    "documents",
    "full",
    "pieces",
    "prefix_lm",
    "sliding_window",
    "take",
]
