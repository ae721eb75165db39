"""Token merging over ranks: sequences made shorter, exactly, and without telling the past of the future.

    windows, segments, grid       by position: windows, words and identifiers, patches of a picture
    similar                       by similarity, inside windows; causal
    bipartite                     by similarity, over the whole sequence; not causal
    delete                        what a learned gate lets go

Each returns a `Merge`, which says what becomes one. `shorten(merge, plan)` makes a `MergedSequence` of it, which merges this
rank's rows, has the plan for attention over the groups, and unmerges. Merges in a row are one: `first.then(second)`.
`POLICIES` lists them by the names under which a model takes them; `register` adds one.
"""

from ringattn.merging.bipartite_matching import bipartite
from ringattn.merging.exchange import gather_rows
from ringattn.merging.gate import DeleteGate, RateController, delete
from ringattn.merging.merge import Merge, grid, segments, windows
from ringattn.merging.merged_sequence import MergedSequence, shorten
from ringattn.merging.placement import LayerCost
from ringattn.merging.policies import POLICIES, MergeRequest, register, unregister
from ringattn.merging.similar_rows import similar

__all__ = [
    "DeleteGate",
    "Merge",
    "LayerCost",
    "MergeRequest",
    "POLICIES",
    "RateController",
    "MergedSequence",
    "bipartite",
    "delete",
    "grid",
    "segments",
    "shorten",
    "similar",
    "gather_rows",
    "register",
    "unregister",
    "windows",
]
