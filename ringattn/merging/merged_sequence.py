"""`shorten`: a merge met with a plan. What comes of it merges this rank's rows, plans attention over the groups, and unmerges.

    short = shorten(windows(plan.seq_len, 2), plan, schedule="token_ring")
    y = short.merge(x)                                                            this rank's groups
    y = y + attention(q(y), k(y), v(y), short.plan, key_bias=short.key_bias)      on a sequence half as long
    x = x + short.unmerge(y)                                                      this rank's rows again

With `key_bias` = log size a group weighs as much as its rows would: attention is then exactly that over every key as often as
rows were merged into it (proportional attention: Bolya et al. 2022, https://arxiv.org/abs/2210.09461). Under a causal mask
`unmerge` gives a row the last group that was ready there and not the group it is in, which may hold rows behind it.

What this module does not do: decide what becomes one. That is the policies' part, and the data's.
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
from ringattn.merging.exchange import SlotExchange, down, up
from ringattn.merging.merge import Merge
from ringattn.merging.placement import LayerCost, Placement, crosses, is_causal, placed, seen, untimely
from ringattn.plan.plan import Plan

How = Literal["mean", "sum", "last"]
CHOICES = ("schedule", "topology", "ulysses", "buffer_limit", "training", "partials")


@dataclass(frozen=True, eq=False)
class MergedSequence:
    """A merged sequence on its ranks. Made by `shorten`.

    Attributes:
        plan: for attention over the groups; `plan.rows(rank)` slots on each rank, empty ones included.
        full: the plan of the rows.
        groups: what is merged.
        placement: in which slot of which rank each group lies.
    """

    groups: Merge
    full: Plan
    plan: Plan
    placement: Placement
    group: Group | None
    rank: int

    def merge(self, x: Tensor, how: How = "mean", weights: Tensor | None = None) -> Tensor:
        """This rank's groups. Collective, differentiable in x and weights.

        Args:
            x: (batch, rows, ...), this rank's rows of the full plan.
            how: "mean" of a group's rows, their "sum", or only the "last" of them.
            weights: (batch, rows), not negative: of each row in the mean or sum. For rows that are themselves groups give their
                sizes; for a mean that is learned, what a network made of the rows.

        Returns:
            (batch, slots, ...) in the dtype of x; 0 in slots that are empty.

        Raises:
            InputError: x or weights do not fit the plan. Raised on every rank.
            MismatchError: ranks came with different merges, shapes or arguments. Raised on every rank.
        """
        batch, rows = self.groups.batch, self.full.rows(self.rank)
        problem = self._misfit("x", x, rows)
        if problem is None and (not isinstance(how, str) or how not in ("mean", "sum", "last")):
            problem = f"how={short_repr(how)}; choose mean, sum or last"
        if problem is None and weights is not None:
            problem = error_message(lambda: _real("weights", weights))
        if problem is None and weights is not None and (how == "last" or tuple(weights.shape) != (batch, rows)):
            problem = f"weights has shape {tuple(weights.shape)}; give {(batch, rows)}, with how='mean' or 'sum'"
        gradient = gradient_of(x, weights)
        group, together = self._agree("merge", problem, x, gradient, how=how, weights=weights is not None)
        flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
        if how == "last":
            flat = flat.where(self._own(self.groups.leads).unsqueeze(-1), 0)
        elif weights is not None:
            flat = flat.to(accum_dtype(x.dtype))
            flat = torch.cat([flat * weights.unsqueeze(-1), weights.unsqueeze(-1)], dim=-1)
        elif how == "mean":
            flat = flat.to(accum_dtype(x.dtype))
        flat = in_backward(flat) if together else flat
        (found,) = up([self._to_groups], [flat], transport_for(group))
        if weights is not None:
            found, total = found[..., :-1], found[..., -1:]
            found = found / total.where(total > 0, 1) if how == "mean" else found
        elif how == "mean":
            found = found / self.sizes.clamp(min=1).to(found.dtype).unsqueeze(-1)
        return found.to(x.dtype).unflatten(2, x.shape[2:]) if x.ndim > 2 else found.to(x.dtype).squeeze(-1)

    def unmerge(self, y: Tensor) -> Tensor:
        """For each of this rank's rows what is in its group; under a causal mask, in the last group that was ready there.

        y: (batch, slots, ...), this rank's groups. Returns (batch, rows, ...); 0 for rows that are deleted, or before the first
        group is ready. Collective, differentiable. Raises as `merge` does.
        """
        group, together = self._agree("unmerge", self._misfit("y", y, self.plan.rows(self.rank)), y, gradient_of(y))
        flat = y.flatten(2) if y.ndim > 2 else y.unsqueeze(-1)
        flat = in_backward(flat) if together else flat
        (found,) = down([self._from_groups], [flat], transport_for(group))
        return found.unflatten(2, y.shape[2:]) if y.ndim > 2 else found.squeeze(-1)

    @cached_property
    def sizes(self) -> Tensor:
        """int64 (batch, slots): rows in each of this rank's groups; 0 in a slot that is empty."""
        slots = self.placement.of(self.groups.numbers)
        whole = torch.zeros(slots.shape[0], self.plan.seq_len + 1, dtype=torch.int64, device=slots.device)
        whole.scatter_add_(1, slots.where(slots >= 0, self.plan.seq_len), torch.ones_like(slots))
        return whole[:, resident_positions(self.plan.layout, self.rank).to(slots.device)]

    @cached_property
    def key_bias(self) -> Tensor:
        """(batch, slots): log of `sizes`, -inf in a slot that is empty; fp32, or fp64 where the plan is for that."""
        return self.sizes.to(torch.float64 if self.full.dtype == "float64" else torch.float32).log()

    @cached_property
    def is_even(self) -> bool:
        """Whether all groups of all ranks have one size and no slot is empty: a key bias then changes nothing."""
        counts = torch.zeros_like(self.groups.into).scatter_add(
            1, self.groups.into.clamp(min=0), (self.groups.into >= 0).long()
        )
        sizes = counts[self.groups.leads]
        return set(self.groups.counts) == {self.plan.seq_len} and int(sizes.min()) == int(sizes.max())

    @cached_property
    def positions(self) -> Tensor:
        """int64 (batch, slots): the row at which each of this rank's groups stands, its last; 0 in a slot that is empty."""
        own = resident_positions(self.plan.layout, self.rank).to(self.placement.leaders.device)
        return self.placement.leaders[:, own].clamp(min=0)

    @cached_property
    def _to_groups(self) -> SlotExchange:
        return self._route(self.groups.numbers)

    @cached_property
    def _from_groups(self) -> SlotExchange:
        if not is_causal(self.full.mask):
            return self._to_groups
        merge, known = self.groups, self.groups.latest
        here = torch.arange(merge.seq_len, device=known.device).expand_as(known)
        stands = self.placement.leaders.gather(1, self.placement.of(known).clamp(min=0))
        return self._route(known.where(seen(self.full.mask, here, stands), -1))

    def _route(self, groups: Tensor) -> SlotExchange:
        return SlotExchange(self.placement.of(groups), self.full.layout, self.plan.layout, self.rank)

    def _own(self, whole: Tensor) -> Tensor:
        return whole[:, resident_positions(self.full.layout, self.rank).to(whole.device)]

    def _misfit(self, name: str, x: Tensor, rows: int) -> str | None:
        problem = error_message(lambda: _real(name, x))
        if problem is not None:
            return problem
        expected = (self.groups.batch, rows)
        if tuple(x.shape[:2]) != expected:
            return f"{name} has shape {tuple(x.shape)}; rank {self.rank} has {expected} (batch, rows) here"
        if x.device != self.groups.into.device:
            return f"{name} is on {x.device} and the merge on {self.groups.into.device}; make both on this rank's device"
        return None

    def _agree(self, call: str, problem: str | None, x: Tensor, gradient: Gradient, **said: object) -> tuple[Any, bool]:
        """The group, and whether any of its ranks needs a gradient."""
        group, _ = group_and_rank(self.group, self.full.world)
        plans = {"plan": self.full.digest, "short plan": self.plan.digest}
        fields: dict[str, object] = {"call": call, "merge": self.groups.digest, **plans}
        if problem is not None:
            agree(group, fields, problem)
        fields |= {"dtype": x.dtype, "shape beside the rows": tuple(x.shape[2:])}
        return group, agree(group, fields | said, device=x.device, gradient=gradient)


def _real(name: str, x: Tensor) -> None:
    if as_strided_tensor(name, x).is_complex():
        raise InputError(f"{name} has dtype {x.dtype}; give real numbers")


def shorten(
    merge: Merge,
    plan: Plan,
    *,
    group: Group | None = None,
    layout: Literal["auto", "stay", "even"] = "auto",
    bucket: int = 1,
    pay: LayerCost | None = None,
    **choices: Any,
) -> MergedSequence:
    """Plan attention over the groups of `merge`. No communication: every rank does the same by itself.

    Args:
        merge: of `plan.seq_len` rows, the same on every rank, on the device of what will be merged.
        plan: for attention over the rows; its heads, head_dim, dtype, kernel and mask are taken over.
        group: the process group or 1-D DeviceMesh whose ranks hold the sequence; the default group by default.
        layout: "stay": every group on the rank of its last row; "even": as many on every rank; "auto": what costs less in all,
            see `balance`.
        bucket: counts of slots are multiples of this. Where they depend on data, 64 or more lets plans be found again. In a
            batch of several sequences it holds for every document of the mask: with short ones leave it at 1.
        pay: what "auto" reckons with; by default one layer of attention and nothing else.
        choices: more for `make_plan`: schedule, topology, ulysses, buffer_limit, training, partials.

    Raises:
        InputError: the merge does not fit the plan; it joins rows of several documents; it was decided with all of the sequence
            in view and the mask is causal; or the mask cannot be said over groups.
        PlanError: see `make_plan`.
    """
    instance("merge", merge, Merge, InputError, "make one with windows, similar, bipartite, segments, ...")
    instance("plan", plan, Plan, InputError, "make one with make_plan(...)")
    check_group(group)
    if pay is not None:
        instance("pay", pay, LayerCost, InputError, "give a Pay(layers, batch, dim, row_flops), or None")
    bucket = count("bucket", bucket, InputError)
    if unknown := [name for name in choices if name not in CHOICES]:
        raise InputError(f"{unknown[0]}={short_repr(choices[unknown[0]])}; of make_plan's arguments give {', '.join(CHOICES)}")
    _, rank = group_and_rank(group, plan.world)
    if merge.seq_len != plan.seq_len:
        raise InputError(f"merge is of {merge.seq_len} rows and the plan for {plan.seq_len}; make both for one sequence")
    if plan.layout.keys is not None or plan.layout.first:
        raise InputError(
            "shorten(plan): queries and keys of this plan lie apart; merge with a plan in which they are the same rows"
        )
    if merge.sees_all and (is_causal(plan.mask) or len(plan.mask.bounds) > 2):
        raise InputError(f"mask {plan.mask} keeps rows from seeing all others: {merge.sees_all}")
    row = crosses(merge, plan.mask)
    if row is not None:
        raise InputError(
            f"row {row} is merged with one of another document of mask {plan.mask}; give the policy its cu_seqlens"
        )
    row = untimely(merge, plan.mask)
    if row is not None:
        raise InputError(
            f"the group at row {row} is known at row {int(merge.ready[:, row].max())}, and mask {plan.mask} shows it earlier; "
            "let windows begin anew where the mask changes: cu_seqlens=(0, prefix, seq_len)"
        )
    short, placement = placed(merge, plan, layout, bucket, pay or LayerCost(), choices)
    return MergedSequence(merge, plan, short, placement, group, rank)
