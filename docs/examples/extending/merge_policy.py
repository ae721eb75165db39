"""Adds a merge policy: a run of equal tokens becomes one row, as the spaces of an indented program."""

import torch

from ringattn.merging import Merge, MergeRequest, gather_rows, register, segments


def runs(request: MergeRequest) -> Merge:
    """That a run ends shows in the token behind it, so a causal model learns of it one row later: lookahead=1."""
    tokens = gather_rows(request.tokens, request.plan.layout, request.group)  # (batch, seq_len), the same on every rank
    ends = torch.ones_like(tokens, dtype=torch.bool)
    ends[:, :-1] = tokens[:, :-1] != tokens[:, 1:]
    ends[:, [cut - 1 for cut in request.cuts[1:]]] = True  # documents are not merged with each other
    ends[:, : request.protect] = True
    return segments(ends, lookahead=1)


register("runs", runs, summary="runs of equal tokens")
