"""Token merging over ranks: sequences made shorter, exactly, and without telling the past of the future.

    windows, segments, grid       by position: windows, words and identifiers, patches of a picture
    similar                       by similarity, inside windows; causal
    bipartite                     by similarity, over the whole sequence; not causal
    delete                        what a learned gate lets go

Each returns a `Merge`, which says what becomes one. `shorten(merge, plan)` makes a `Short` of it, which merges this rank's
rows, has the plan for attention over the groups, and unmerges. Merges in a row are one: `first.then(second)`.
"""

from ringattn.compress.balance import Pay
from ringattn.compress.bipartite import bipartite
from ringattn.compress.gate import DeleteGate, RateController, delete
from ringattn.compress.merge import Merge
from ringattn.compress.segments import grid, segments
from ringattn.compress.short import Short, shorten
from ringattn.compress.similar import similar
from ringattn.compress.tell import tell
from ringattn.compress.windows import windows

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
