"""Adds a mask: the first keys of the sequence are always in sight, and of the others a window (StreamingLLM's pattern)."""

from ringattn import Mask
from ringattn.sequence import END, Band, Rect


def sinks_and_window(sinks: int, window: int) -> Mask:
    """A query sees keys 0 .. sinks - 1, itself, and `window` keys before itself; nothing behind itself."""
    # Disjoint rectangles of queries and keys; a band keeps left <= key - query <= right.
    of_sinks = Rect(q_start=0, q_stop=END, k_start=0, k_stop=sinks, band=Band(right=0))
    of_others = Rect(q_start=sinks, q_stop=END, k_start=sinks, k_stop=END, band=Band(-window, 0))
    return Mask(f"sinks_and_window({sinks},{window})", (of_sinks, of_others))
