"""Merges, plans and unmerges a sharded sequence: `shorten` combines a merge with a plan.

    short = shorten(windows(plan.seq_len, 2), plan, schedule="token_ring")
    y = short.merge(x)                                                            this rank's groups
    y = y + attention(q(y), k(y), v(y), short.plan, key_bias=short.key_bias)      on a sequence half as long
    x = x + short.unmerge(y)                                                      this rank's rows again

With `key_bias` = log size a group has the attention weight of all its rows: attention is then exactly that over each key
repeated as often as rows were merged into it (proportional attention: Bolya et al. 2022, https://arxiv.org/abs/2210.09461).
Under a causal mask `unmerge` gives a row the last group that is ready at its position, not its own group, which may hold later
rows. Which rows merge is decided by the policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ringattn._validation import count, error_message, instance, short_repr
from ringattn.comm.consistency import Gradient, agree
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.comm.select import transport_for
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor, check_group
from ringattn.execution.joint_backward import gradient_of, in_backward
from ringattn.execution.sharding import resident_positions
from ringattn.kernels.lse import accum_dtype
from ringattn.merging.exchange import SlotExchange, read_slots, sum_to_slots
from ringattn.merging.merge import Merge
from ringattn.merging.placement import (
    LayerCost,
    Placement,
    choose_placement,
    crosses_documents,
    is_causal,
    is_visible,
    seen_before_ready,
)
from ringattn.plan.plan import Plan

How = Literal["mean", "sum", "last"]
CHOICES = ("schedule", "topology", "ulysses", "buffer_limit", "training", "partials")


@dataclass(frozen=True, eq=False)
class MergedSequence:
    """A merged sequence on its ranks. Made by `shorten`.

    Attributes:
        groups: the merge.
        full: the plan of the rows.
        plan: the plan for attention over the groups; `plan.rows(rank)` slots on each rank, empty ones included.
        placement: in which slot of which rank each group lies.
    """

    groups: Merge
    full: Plan
    plan: Plan
    placement: Placement
    group: Group | None
    rank: int

    def merge(self, x: Tensor, how: How = "mean", weights: Tensor | None = None) -> Tensor:
        """Merges rows into this rank's groups. Collective, differentiable in x and weights.

        Args:
            x: (batch, rows, ...), this rank's rows of the full plan.
            how: "mean" of a group's rows, their "sum", or only the "last" of them.
            weights: (batch, rows), not negative: of each row in the mean or sum. For rows that are themselves groups pass their
                sizes; for a learned mean, the output of a network.

        Returns:
            (batch, slots, ...) in the dtype of x; 0 in empty slots.

        Raises:
            InputError: x or weights do not fit the plan. Raised on every rank.
            MismatchError: ranks passed different merges, shapes or arguments. Raised on every rank.
        """
        batch, rows = self.groups.batch, self.full.rows(self.rank)
        problem = self._misfit("x", x, rows)
        if problem is None and (not isinstance(how, str) or how not in ("mean", "sum", "last")):
            problem = f"how={short_repr(how)}; choose mean, sum or last"
        if problem is None and weights is not None:
            problem = error_message(lambda: _check_real("weights", weights))
        if problem is None and weights is not None and (how == "last" or tuple(weights.shape) != (batch, rows)):
            problem = f"weights has shape {tuple(weights.shape)}; give {(batch, rows)}, with how='mean' or 'sum'"
        gradient = gradient_of(x, weights)
        group, needs_gradient = self._agree("merge", problem, x, gradient, how=how, weights=weights is not None)
        flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
        if how == "last":
            flat = flat.where(self._own(self.groups.leads).unsqueeze(-1), 0)
        elif weights is not None:
            flat = flat.to(accum_dtype(x.dtype))
            flat = torch.cat([flat * weights.unsqueeze(-1), weights.unsqueeze(-1)], dim=-1)
        elif how == "mean":
            flat = flat.to(accum_dtype(x.dtype))
        flat = in_backward(flat) if needs_gradient else flat
        (merged,) = sum_to_slots([self._to_groups], [flat], transport_for(group))
        if weights is not None:
            merged, total = merged[..., :-1], merged[..., -1:]
            merged = merged / total.where(total > 0, 1) if how == "mean" else merged
        elif how == "mean":
            merged = merged / self.sizes.clamp(min=1).to(merged.dtype).unsqueeze(-1)
        return merged.to(x.dtype).unflatten(2, x.shape[2:]) if x.ndim > 2 else merged.to(x.dtype).squeeze(-1)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copies groups back to this rank's rows; under a causal mask, to each row the last group that is ready there.

        y: (batch, slots, ...), this rank's groups. Returns (batch, rows, ...); 0 for deleted rows and for rows before the first
        group is ready. Collective, differentiable. Raises as `merge` does.
        """
        group, needs_gradient = self._agree("unmerge", self._misfit("y", y, self.plan.rows(self.rank)), y, gradient_of(y))
        flat = y.flatten(2) if y.ndim > 2 else y.unsqueeze(-1)
        flat = in_backward(flat) if needs_gradient else flat
        (rows,) = read_slots([self._from_groups], [flat], transport_for(group))
        return rows.unflatten(2, y.shape[2:]) if y.ndim > 2 else rows.squeeze(-1)

    @cached_property
    def sizes(self) -> Tensor:
        """int64 (batch, slots): rows in each of this rank's groups; 0 in an empty slot."""
        slots = self.placement.slots_of(self.groups.numbers)
        sizes = torch.zeros(slots.shape[0], self.plan.seq_len + 1, dtype=torch.int64, device=slots.device)
        sizes.scatter_add_(1, slots.where(slots >= 0, self.plan.seq_len), torch.ones_like(slots))
        return sizes[:, resident_positions(self.plan.layout, self.rank).to(slots.device)]

    @cached_property
    def key_bias(self) -> Tensor:
        """(batch, slots): log of `sizes`, -inf in an empty slot; fp32, or fp64 where the plan's dtype is."""
        return self.sizes.to(torch.float64 if self.full.dtype == "float64" else torch.float32).log()

    @cached_property
    def is_even(self) -> bool:
        """Whether all groups of all ranks have the same size and no slot is empty; a key bias then has no effect."""
        counts = torch.zeros_like(self.groups.into).scatter_add(
            1, self.groups.into.clamp(min=0), (self.groups.into >= 0).long()
        )
        sizes = counts[self.groups.leads]
        return set(self.groups.counts) == {self.plan.seq_len} and int(sizes.min()) == int(sizes.max())

    @cached_property
    def positions(self) -> Tensor:
        """int64 (batch, slots): the position of each of this rank's groups, its last row; 0 in an empty slot."""
        own = resident_positions(self.plan.layout, self.rank).to(self.placement.leaders.device)
        return self.placement.leaders[:, own].clamp(min=0)

    @cached_property
    def _to_groups(self) -> SlotExchange:
        return self._route(self.groups.numbers)

    @cached_property
    def _from_groups(self) -> SlotExchange:
        if not is_causal(self.full.mask):
            return self._to_groups
        merge, latest = self.groups, self.groups.latest
        index = torch.arange(merge.seq_len, device=latest.device).expand_as(latest)
        leaders = self.placement.leaders.gather(1, self.placement.slots_of(latest).clamp(min=0))
        return self._route(latest.where(is_visible(self.full.mask, index, leaders), -1))

    def _route(self, groups: Tensor) -> SlotExchange:
        return SlotExchange(self.placement.slots_of(groups), self.full.layout, self.plan.layout, self.rank)

    def _own(self, x: Tensor) -> Tensor:
        return x[:, resident_positions(self.full.layout, self.rank).to(x.device)]

    def _misfit(self, name: str, x: Tensor, rows: int) -> str | None:
        problem = error_message(lambda: _check_real(name, x))
        if problem is not None:
            return problem
        expected = (self.groups.batch, rows)
        if tuple(x.shape[:2]) != expected:
            return f"{name} has shape {tuple(x.shape)}; rank {self.rank} has {expected} (batch, rows) here"
        if x.device != self.groups.into.device:
            return f"{name} is on {x.device} and the merge on {self.groups.into.device}; make both on this rank's device"
        return None

    def _agree(self, call: str, problem: str | None, x: Tensor, gradient: Gradient, **more_fields: object) -> tuple[Any, bool]:
        """Checks that ranks agree; returns the group, and whether any of its ranks needs a gradient."""
        group, _ = group_and_rank(self.group, self.full.world)
        plans = {"plan": self.full.digest, "short plan": self.plan.digest}
        fields: dict[str, object] = {"call": call, "merge": self.groups.digest, **plans}
        if problem is not None:
            agree(group, fields, problem)
        fields |= {"dtype": x.dtype, "shape beside the rows": tuple(x.shape[2:])}
        return group, agree(group, fields | more_fields, device=x.device, gradient=gradient)


def _check_real(name: str, x: Tensor) -> None:
    if as_strided_tensor(name, x).is_complex():
        raise InputError(f"{name} has dtype {x.dtype}; give real numbers")


def shorten(
    merge: Merge,
    plan: Plan,
    *,
    group: Group | None = None,
    layout: Literal["auto", "stay", "even"] = "auto",
    bucket: int = 1,
    cost: LayerCost | None = None,
    **choices: Any,
) -> MergedSequence:
    """Plans attention over the groups of `merge`. No communication.

    Args:
        merge: of `plan.seq_len` rows, the same on every rank, on the device of the tensors to merge.
        plan: for attention over the rows; its heads, head_dim, dtype, kernel and mask are kept.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.
        layout: "stay": every group on the rank of its last row; "even": equally many on every rank; "auto": the cheaper of
            both, see `choose_placement`.
        bucket: counts of slots are multiples of this. Where they depend on data, 64 or more lets plans be reused. In a batch
            of several sequences it applies to every document of the mask: with short documents leave it at 1.
        cost: the layers that "auto" prices; by default one layer of attention alone.
        choices: further arguments of `make_plan`: schedule, topology, ulysses, buffer_limit, training, partials.

    Raises:
        InputError: the merge does not fit the plan; it joins rows of several documents; it is not causal and the mask is; or
            the mask cannot be expressed over groups.
        PlanError: see `make_plan`.
    """
    instance("merge", merge, Merge, InputError, "make one with windows, similar, bipartite, segments, ...")
    instance("plan", plan, Plan, InputError, "make one with make_plan(...)")
    check_group(group)
    if cost is not None:
        instance("cost", cost, LayerCost, InputError, "give a LayerCost(layers, batch, dim, row_flops), or None")
    bucket = count("bucket", bucket, InputError)
    if unknown := [name for name in choices if name not in CHOICES]:
        raise InputError(f"{unknown[0]}={short_repr(choices[unknown[0]])}; of make_plan's arguments give {', '.join(CHOICES)}")
    _, rank = group_and_rank(group, plan.world)
    if merge.seq_len != plan.seq_len:
        raise InputError(f"merge has {merge.seq_len} rows and the plan {plan.seq_len}; make both for one sequence")
    if plan.layout.keys is not None or plan.layout.first:
        raise InputError(
            "shorten(plan): queries and keys of this plan have different layouts; merge with a plan in which they are the same "
            "rows"
        )
    if merge.sees_all and (is_causal(plan.mask) or len(plan.mask.bounds) > 2):
        raise InputError(f"mask {plan.mask} hides keys from some rows: {merge.sees_all}")
    row = crosses_documents(merge, plan.mask)
    if row is not None:
        raise InputError(
            f"row {row} is merged with a row of another document of mask {plan.mask}; give the policy its cu_seqlens"
        )
    row = seen_before_ready(merge, plan.mask)
    if row is not None:
        raise InputError(
            f"the group at row {row} is ready at row {int(merge.ready[:, row].max())}, and mask {plan.mask} shows it earlier; "
            "let windows restart where the mask changes: cu_seqlens=(0, prefix, seq_len)"
        )
    short, placement = choose_placement(merge, plan, layout, bucket, cost or LayerCost(), choices)
    return MergedSequence(merge, plan, short, placement, group, rank)
