"""Merges tokens of a sequence that is sharded over ranks: shorter sequences, exact, and causal where the mask is.

    windows, segments, grid       by position: fixed windows, words or identifiers, patches of an image
    similar                       by similarity within windows; causal
    bipartite                     by similarity over the whole sequence; not causal
    delete                        rows that a learned gate removes

Each policy returns a `Merge`, which says which rows form a group. `shorten(merge, plan)` makes a `MergedSequence`, which merges
this rank's rows, has the plan for attention over the groups, and unmerges. Merges compose: `first.then(second)`.
`POLICIES` lists the policies by the names under which a model takes them; `register` adds one.
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
