"""Token merging over ranks: sequences made shorter, exactly, and without telling the past of the future.

    windows, segments, grid       by position: windows, words and identifiers, patches of a picture
    similar                       by similarity, inside windows; causal
    bipartite                     by similarity, over the whole sequence; not causal
    delete                        what a learned gate lets go

Each returns a `Merge`, which says what becomes one. `shorten(merge, plan)` makes a `Short` of it, which merges this rank's
rows, has the plan for attention over the groups, and unmerges. Merges in a row are one: `first.then(second)`.
"""

from ringattn.merging.bipartite_matching import bipartite
from ringattn.merging.exchange import tell
from ringattn.merging.gate import DeleteGate, RateController, delete
from ringattn.merging.merge import Merge, grid, segments, windows
from ringattn.merging.merged_sequence import Short, shorten
from ringattn.merging.placement import Pay
from ringattn.merging.similar_rows import similar

__all__ = [
    "DeleteGate",
    "Merge",
    "Pay",
    "RateController",
    "Short",
    "bipartite",
    "delete",
    "grid",
    "segments",
    "shorten",
    "similar",
    "tell",
    "windows",
]
