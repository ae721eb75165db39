"""Checks the arguments of matching policies on all ranks, and draws random numbers by (seed, layer, position).

The random numbers are the same on any number of ranks and in any order of drawing: a counter-based generator mixes the three
numbers as SplitMix64 does (Steele et al. 2014, https://doi.org/10.1145/2714064.2660195), in wrapping 64-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn._validation import as_finite_float, as_int, error_message, one_of, short_repr
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, cannot_move
from ringattn.comm.select import transport_for
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor, resolve_group
from ringattn.merging.matching import MOST_CHANNELS
from ringattn.sequence.layout import Layout


def uniform(positions: Tensor, seed: int, layer: int, stream: int = 0) -> Tensor:
    """Uniform random numbers in (0, 1), fp64, the shape of `positions` (int64). stream: distinguishes draws at one position."""
    state = positions.long()
    for number in (seed, layer, stream):
        state = _mixed(state + _signed(0x9E3779B97F4A7C15 * (2 * number + 1)))
    return ((state >> 12) & ((1 << 52) - 1)).double().add(0.5) * 2.0**-52


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch has no unsigned arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


SCORERS = ("alternate", "energy", "random")


class MatchArgs(NamedTuple):
    """The arguments of a matching policy; see `similar`."""

    remove: float | None = None
    threshold: float | None = None
    scorer: str = "alternate"
    margin: float = 0.5
    seed: int = 0
    layer: int = 0

    def random_numbers(self, positions: Tensor, batch: int) -> Tensor:
        """Random numbers at `positions`, different in each sequence of a batch: (batch, ...)."""
        return torch.stack([uniform(positions, self.seed, self.layer, n) for n in range(batch)])

    def check(self) -> None:
        if problem := self._problem():
            raise InputError(problem)
        one_of("scorer", self.scorer, SCORERS, InputError)
        for name in ("seed", "layer"):
            as_int(name, getattr(self, name), InputError)
        if as_finite_float(self.margin) is None or abs(self.margin) > 2:
            raise InputError(f"margin={short_repr(self.margin)}: is a cosine, from -1 to 1")

    def _problem(self) -> str | None:
        if self.remove is None and self.threshold is None:
            return "give remove (a share of the rows), threshold (a cosine), or both"
        if self.remove is not None and not 0 < (as_finite_float(self.remove) or 0) <= 0.5:
            return (
                f"remove={short_repr(self.remove)}: must be more than 0 and at most 0.5: one half of the rows can merge into "
                "the other"
            )
        if self.threshold is not None and (as_finite_float(self.threshold) is None or not -1 <= self.threshold <= 1):
            return f"threshold={short_repr(self.threshold)}: is a cosine, from -1 to 1"
        return None


def agree_on_arguments(
    match_args: MatchArgs,
    metric: Tensor,
    layout: Layout,
    protected: Tensor | None,
    group: Group | None,
    other_fields: Callable[[], dict[str, object]],
) -> tuple[Transport, Tensor]:
    """Checks that all ranks passed the same arguments; returns the transport and this rank's protected rows.

    other_fields: makes further fields that ranks must agree on.

    Raises:
        InputError: an argument does not fit. Raised on every rank.
        MismatchError: ranks passed different arguments. Raised on every rank.
    """
    process_group, rank = resolve_group(layout, group, Layout)
    fields: dict[str, object] = {"call": "merging"}
    problem = error_message(
        lambda: fields.update(_fields(match_args, metric, layout, rank, protected, process_group) | other_fields())
    )
    agree(process_group, fields, problem, device=metric.device if isinstance(metric, Tensor) else None)
    if protected is None:
        protected = torch.zeros(metric.shape[:2], dtype=torch.bool, device=metric.device)
    return transport_for(process_group), protected


def _fields(
    match_args: MatchArgs, metric: Tensor, layout: Layout, rank: int, protected: Tensor | None, group: dist.ProcessGroup | None
) -> dict[str, object]:
    """The fields that ranks must agree on; raises `InputError` for an argument that does not fit."""
    match_args.check()
    for name, tensor in (("metric", metric), ("protected", metric if protected is None else protected)):
        as_strided_tensor(name, tensor)
    if problem := _misfit(metric, layout, rank, protected, group):
        raise InputError(problem)
    return {"merge by": match_args, "layout": layout.digest, "batch": metric.shape[0], "metric channels": metric.shape[-1]}


def _misfit(metric: Tensor, layout: Layout, rank: int, protected: Tensor | None, group: dist.ProcessGroup | None) -> str | None:
    if metric.ndim != 3 or metric.shape[1] != layout.rows(rank) or not metric.is_floating_point():
        return (
            f"metric: {metric.dtype} of shape {tuple(metric.shape)}; give floating-point (batch, rows, dim) with the "
            f"{layout.rows(rank)} rows that the layout gives rank {rank}"
        )
    if metric.shape[-1] > MOST_CHANNELS:
        return f"metric has {metric.shape[-1]} channels, at most {MOST_CHANNELS} are compared exactly; average keys over heads"
    if layout.keys is not None or layout.first:
        return "layout: queries and keys have different layouts; give one layout for both"
    if protected is not None and (protected.dtype != torch.bool or protected.shape != metric.shape[:2]):
        return f"protected: {protected.dtype} of shape {tuple(protected.shape)}; give bool {tuple(metric.shape[:2])}"
    return cannot_move(group, "metric", metric)
