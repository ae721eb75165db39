"""Lists merge policies by name: functions that decide which rows of a sequence form a group.

`POLICIES` has those of the library; `register` adds one. `ringattn.nn.Merging(policy=...)` takes any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ringattn._validation import Registry, flag, short_repr
from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.merging.bipartite_matching import bipartite
from ringattn.merging.exchange import gather_rows
from ringattn.merging.gate import delete
from ringattn.merging.merge import Merge, segments, windows
from ringattn.merging.placement import mask_edges
from ringattn.merging.similar_rows import similar
from ringattn.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class MergeRequest:
    """The input of a policy: this rank's rows and the options of the merge.

    Attributes:
        hidden: (batch, rows, dim), this rank's rows before the blocks that run on the short sequence.
        tokens: int64 (batch, rows).
        positions: int64 (rows,) or (batch, rows), their positions in the whole sequence.
        plan, group: of attention over all rows, and the ranks that hold them.
        make_metric: computes the tensor by which rows are compared; see `metric`.
        kept: bool (batch, rows), the rows that a learned gate keeps; None where the model has no gate.
        factor, window, remove, threshold, scorer, ends, protect, seed: as in `ringattn.nn.Merging`.
        layer: the first block that runs on the short sequence.
    """

    hidden: Tensor
    tokens: Tensor
    positions: Tensor
    plan: Plan
    group: Group | None
    make_metric: Callable[[Tensor], Tensor]
    kept: Tensor | None
    factor: int
    window: int
    remove: float
    threshold: float | None
    scorer: str
    ends: tuple[int, ...]
    protect: int
    seed: int
    layer: int

    @cached_property
    def metric(self) -> Tensor:
        """(batch, rows, channels): keys of the next block, averaged over heads."""
        return self.make_metric(self.hidden)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions where windows must restart because the mask changes, with 0 and the end."""
        return (0, *mask_edges(self.plan.mask, self.plan.seq_len), self.plan.seq_len)

    @property
    def protected(self) -> Tensor:
        """bool (batch, rows): rows that must not merge."""
        return (self.positions < self.protect).expand(self.hidden.shape[:2])


@dataclass(frozen=True)
class Policy:
    """A named merge policy.

    decide: makes the `Merge`, the same on every rank; `gather_rows` exchanges the content of rows.
    summary: what it does, in one line.
    static: whether it depends on positions alone, so that one merge serves every step.
    pairs: whether it merges rows in pairs, so that `remove` is at most a half.
    deletes: whether a learned gate deletes rows.
    causal: whether it may be used under a causal mask.
    """

    decide: Callable[[MergeRequest], Merge]
    summary: str
    static: bool = False
    pairs: bool = False
    deletes: bool = False
    causal: bool = True


def register(name: str, decide: Callable[[MergeRequest], Merge], *, summary: str = "", static: bool = False) -> None:
    """Adds a policy that `ringattn.nn.Merging(policy=name)` accepts. Call it on every rank alike.

    Ranks compare the merges before any row moves: different policies or decisions raise `MismatchError` on all ranks.

    Args:
        name: letters, digits, _ and -.
        decide: from a `MergeRequest` to a `Merge` of the whole sequence; called in every forward pass, on all ranks together.
        summary: what it does, in one line.
        static: whether it depends on positions alone; then it is called once for each plan.

    Raises:
        InputError: the name is taken or invalid, or `decide` is not callable.
    """
    if not callable(decide):
        raise InputError(f"decide={short_repr(decide)}; give a function from a MergeRequest to a Merge")
    POLICIES.register(name, Policy(decide, summary, flag("static", static, InputError)))


def unregister(name: str) -> None:
    """Removes a registered policy. Raises `InputError` for an unknown name."""
    POLICIES.unregister(name)


def _windows(request: MergeRequest) -> Merge:
    first = torch.arange(request.plan.seq_len) < request.protect
    batch, device = len(request.hidden), request.hidden.device
    return windows(request.plan.seq_len, request.factor, protected=first, cu_seqlens=request.cuts, batch=batch, device=device)


def _words(request: MergeRequest) -> Merge:
    device, positions = request.hidden.device, request.positions
    last = torch.isin(positions + 1, torch.tensor(request.cuts[1:-1], device=device))
    protected = positions < request.protect
    ends = torch.isin(request.tokens, torch.tensor(request.ends, device=device)) | last | protected
    return segments(gather_rows(ends, request.plan.layout, request.group))


def _gate(request: MergeRequest) -> Merge:
    assert request.kept is not None
    return delete(request.kept, request.plan.layout, request.group)


def _similar(request: MergeRequest) -> Merge:
    return similar(
        request.metric,
        request.plan.layout,
        window=request.window,
        cu_seqlens=request.cuts,
        group=request.group,
        remove=request.remove,
        threshold=request.threshold,
        scorer=request.scorer,  # type: ignore[arg-type]  # checked there
        protected=request.protected,
        seed=request.seed,
        layer=request.layer,
    )


def _bipartite(request: MergeRequest) -> Merge:
    return bipartite(
        request.metric,
        request.plan.layout,
        group=request.group,
        remove=request.remove,
        threshold=request.threshold,
        scorer=request.scorer,  # type: ignore[arg-type]  # checked there
        protected=request.protected,
        seed=request.seed,
        layer=request.layer,
    )


POLICIES: Registry[Policy] = Registry(
    "merge policy",
    {
        "windows": Policy(_windows, "every `factor` rows", static=True),
        "similar": Policy(_similar, "similar rows within windows of `window`", pairs=True),
        "bipartite": Policy(_bipartite, "similar rows of the whole sequence, not causal", pairs=True, causal=False),
        "words": Policy(_words, "rows up to and including a token of `ends`"),
        "gate": Policy(_gate, "all but the rows that a learned gate deletes", deletes=True),
    },
)
