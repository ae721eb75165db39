"""Matches similar rows over ranks: fixed-point similarity, bipartite soft matching, and its run by the attention engine.

Which rows merge depends on comparing similarities, and ties are common (padding, repeated tokens). A floating-point matrix
product has other last bits for other shapes, so one process and eight ranks would merge different rows. Here a row's direction
is rounded to integers of at most 2^20; sums of up to 4,096 of their products are integers below 2^53, which fp64 holds exactly:
cosine similarity to 2e-5 or better, and the same bits for every tiling, order, thread count and device.

Bipartite soft matching, on any number of sequences at once; rows are along the last dimension:

    sides            every other row is in A, the rest in B; or, by energy, the rows most similar to all others, alternately
    best_match       for each row of A the most similar row of B; of equals the first
    select_pairs     the `remove` most similar pairs, of equals the first; or all above a threshold
    labels           a selected row of A takes the label of its row of B

`Matching` runs it over ranks with the schedule, the program and the transport of attention. Directions travel instead of
queries, keys and values, and instead of (out, lse) a state with its own merge rule:

    BestMatch        (similarity, position) of the most similar row; the larger wins, and of equals the first position
    EnergySum        the sum of energies

Both are integers and both rules are associative, commutative and exact, so any schedule on any number of ranks gives the result
of one process, bit for bit.

Bolya et al. 2022, https://arxiv.org/abs/2210.09461 (ToMe); energy: Tran et al. 2024, https://arxiv.org/abs/2405.16148 (PiToMe).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache, reduce
from math import exp

import torch
from torch import Tensor

from ringattn.comm.transport import Transport
from ringattn.comm.wire_format import Spec, Wire
from ringattn.errors import InputError
from ringattn.execution.engine import Payload, run
from ringattn.plan.plan import Plan
from ringattn.planner import make_plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, TileBatch
from ringattn.sequence.layout import Layout, Span
from ringattn.sequence.mask import full

UNIT = 1 << 20  # length of a direction
MAX_SIMILARITY = UNIT * UNIT  # similarity of a direction with itself, up to rounding
NO_MATCH = -(1 << 62)  # below every similarity
MOST_CHANNELS = 4096  # the squares of this many 20-bit integers sum to less than 2^53


def fixed_point(metric: Tensor) -> Tensor:
    """Directions of the rows of `metric`, (..., dim), as int32. A row of zeros, or one with NaN or inf, becomes 0."""
    if metric.shape[-1] > MOST_CHANNELS:
        raise InputError(
            f"metric has {metric.shape[-1]} channels and similarity is exact for at most {MOST_CHANNELS}; use the mean over "
            "heads, or a projection"
        )
    x = metric.detach().double()
    largest = x.abs().amax(-1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    largest = largest.where(usable, 1)
    power = largest / torch.frexp(largest).mantissa  # of two: division by it scales the largest to [1/2, 1) without rounding
    x = (x.where(usable, 0) / power * UNIT).round()  # the sum of their squares is exact in any order
    length = x.square().sum(-1, keepdim=True).sqrt()
    return (x / length.clamp(min=1) * UNIT).round().int()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(..., rows of a, rows of b): integers in fp64, `MAX_SIMILARITY` times the cosine. a, b: from `fixed_point`."""
    return a.double() @ b.double().transpose(-1, -2)


UNMATCHED, A, B = 0, 1, 2
STEPS = 14  # bits to which similarity is rounded before its energy is looked up
ENERGY = 1 << 32  # an energy of 1: sums over 2^30 rows stay below 2^63


def alternating_sides(index: Tensor, free: Tensor) -> Tensor:
    """Assigns sides by the row's index in its window or sequence: even rows to A, odd rows to B. free: bool, may merge."""
    return torch.where(index % 2 == 0, A, B).where(free, UNMATCHED)


def random_sides(numbers: Tensor, index: Tensor, free: Tensor, every: int = 2) -> Tensor:
    """Assigns one row of every `every` consecutive ones to B, drawn by `numbers`, the rest to A; tomesd does so in 2D."""
    *lead, rows = free.shape
    cells = -(-rows // every)
    padded = torch.nn.functional.pad(numbers.where(free, -1.0), (0, cells * every - rows), value=-1.0)
    winner = padded.view(*lead, cells, every).argmax(-1, keepdim=True)
    select_pairs = torch.zeros(*lead, cells, every, dtype=torch.bool, device=free.device).scatter(-1, winner, True)
    return torch.where(select_pairs.view(*lead, cells * every)[..., :rows], B, A).where(free, UNMATCHED)


def energy_sides(energy: Tensor, free: Tensor, pairs: Tensor) -> Tensor:
    """Assigns the 2 * `pairs` rows of most energy alternately to A and B; all others stay unmatched."""
    ranked = energy.where(free, NO_MATCH).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(ranked).scatter(-1, ranked, torch.arange(ranked.shape[-1], device=ranked.device).expand_as(ranked))
    return torch.where(rank % 2 == 0, A, B).where(free & (rank < 2 * pairs.unsqueeze(-1)), UNMATCHED)


def energies(similarities: Tensor, margin: float) -> Tensor:
    """PiToMe's energy of each pair: the similarity itself above the margin, exp(similarity - margin) - 1 below.

    similarities: from `fixed_point.similarity`. Returns int64, in units of 1 / `ENERGY`.
    """
    table = _table(margin).to(similarities.device)
    return table[((similarities / MAX_SIMILARITY).clamp(-1, 1) * (1 << STEPS)).round().long() + (1 << STEPS)]


@lru_cache(maxsize=8)
def _table(margin: float) -> Tensor:
    """Energy by similarity from -1 to 1: a lookup table, since exp differs in its last bits between devices."""
    values = (n / (1 << STEPS) for n in range(-(1 << STEPS), (1 << STEPS) + 1))
    return torch.tensor([round((x if x >= margin else exp(x - margin) - 1) * ENERGY) for x in values])


def best_match(a: Tensor, b: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `a` its largest similarity to a row of `b`, int64, and the position of that row, of equals the first.

    a, b: from `fixed_point`, (..., rows, dim); positions: int64, of the rows of b, negative for one that is excluded.
    """
    similarities = similarity(a, b).masked_fill((positions < 0).unsqueeze(-2), float(NO_MATCH))
    largest = similarities.amax(-1)
    candidates = positions.unsqueeze(-2).expand_as(similarities)
    first = candidates.where(similarities == largest.unsqueeze(-1), torch.iinfo(torch.int64).max).amin(-1)
    return largest.long(), first


def select_pairs(scores: Tensor, pairs: Tensor | None, threshold: float | None) -> Tensor:
    """Selects the rows of A that merge: bool.

    scores: int64, from `best_match`, `NO_MATCH` for rows that are not in A; pairs: how many at most.
    """
    selected = scores > NO_MATCH
    if threshold is not None:
        selected &= scores > int(threshold * MAX_SIMILARITY)
    if pairs is not None:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(scores.shape[-1], device=scores.device) < pairs.unsqueeze(-1)
        selected &= torch.zeros_like(selected).scatter(-1, ranked, first.expand_as(ranked))
    return selected


BLOCK = 1024  # rows compared at once with all others of a tile; bounds memory


class Matching(ABC):
    """One rank's part of a matching, run by the engine in place of attention.

    rows: (batch, rows, dim) directions; others: the same for the rows they are compared with; positions: int64 (batch, others),
    of the others, negative for padding.
    """

    state: int  # integers in the result of a row

    def __init__(self, plan: Plan, rank: int, rows: Tensor, others: Tensor, positions: Tensor) -> None:
        self.plan, self.rank, self.device = plan, rank, rows.device
        self.operands = {Kind.Q: (rows,), Kind.KV: (others, positions)}

    @abstractmethod
    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        """The result of these rows against these others: int64 (batch, rows, state)."""

    def own(self, item: Item) -> Payload:
        block = self.plan.forward[item.head_group].block(item.kind, item.index)
        return tuple(tensor[:, block.start : block.stop] for tensor in self.operands[item.kind])

    def wire(self, items: tuple[Item, ...]) -> Wire:
        return Wire(spec for item in items for spec in self._specs(item))

    def _specs(self, item: Item) -> Sequence[Spec]:
        count = self.plan.forward[item.head_group].block(item.kind, item.index).rows
        if item.kind is Kind.Q_ACC:
            return [Spec((len(self.operands[Kind.Q][0]), count, self.state), torch.int64)]
        return [Spec((t.shape[0], count, *t.shape[2:]), t.dtype) for t in self.operands[item.kind]]

    def compute(self, tiles: TileBatch, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Payload]:
        others, positions = (torch.cat(parts, dim=1) for parts in zip(*kv, strict=True))
        results: dict[Item, Payload] = {}
        for index, (rows,) in zip(tiles.i, q, strict=True):
            parts = [self.compare(chunk, others, positions) for chunk in rows.split(BLOCK, dim=1)]
            results[Item(tiles.head_group, Kind.Q_ACC, index)] = (torch.cat(parts, dim=1),)
        return results

    def operand(self, item: Item, payload: Payload) -> Payload:
        return payload

    @abstractmethod
    def combine(self, total: Payload, share: Payload) -> Payload:
        """Combines two results of the same rows."""

    def merge(self, item: Item, shares: Sequence[Payload]) -> Payload:
        return reduce(self.combine, shares)

    def ready(self, item: Item, shares: Sequence[Payload]) -> Payload:
        return self.merge(item, shares)

    def write(self, item: Item, shares: Sequence[Payload], slots: Sequence[Tensor]) -> None:
        for slot, tensor in zip(slots, self.merge(item, shares), strict=True):
            slot.copy_(tensor)

    def arrived(self, item: Item, payload: Payload) -> Payload:
        return payload

    def result(self, gathered: dict[Item, list[Payload]]) -> Tensor:
        """The results of this rank's rows in order: int64 (batch, rows, state)."""
        blocks = sorted((self.plan.forward[item.head_group].block(item.kind, item.index).start, item) for item in gathered)
        empty = self.operands[Kind.Q][0].new_empty(len(self.operands[Kind.Q][0]), 0, self.state, dtype=torch.int64)
        return torch.cat([empty, *(self.merge(item, gathered[item])[0] for _, item in blocks)], dim=1)


class BestMatch(Matching):
    """Finds the most similar of all others, and its position."""

    state = 2

    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        return torch.stack(best_match(rows, others, positions), dim=-1)

    def combine(self, total: Payload, share: Payload) -> Payload:
        (a,), (b,) = total, share
        first = (a[..., 0] > b[..., 0]) | ((a[..., 0] == b[..., 0]) & (a[..., 1] <= b[..., 1]))
        return (a.where(first.unsqueeze(-1), b),)


class EnergySum(Matching):
    """Sums energies over all others."""

    state = 1

    def __init__(self, plan: Plan, rank: int, rows: Tensor, others: Tensor, positions: Tensor, *, margin: float) -> None:
        super().__init__(plan, rank, rows, others, positions)
        self.margin = margin

    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        return (
            energies(similarity(rows, others), self.margin).masked_fill((positions < 0).unsqueeze(-2), 0).sum(-1, keepdim=True)
        )

    def combine(self, total: Payload, share: Payload) -> Payload:
        return (total[0] + share[0],)


def run_matchings(matchings: Sequence[Matching], plan: Plan, transport: Transport) -> list[Tensor]:
    """Runs the matchings of the ranks that `transport` hosts; returns their results."""
    ports = transport.ports("matching")
    runs = [
        run(plan.program(matching.rank, backward=False), matching, port)
        for matching, port in zip(matchings, ports, strict=True)
    ]
    return [matching.result(gathered) for matching, gathered in zip(matchings, transport.drive(runs), strict=True)]


def plan_for(rows: Sequence[int], others: Sequence[int], dim: int, schedule: str) -> Plan:
    """Plans the comparison of `rows[rank]` rows of each rank with `others[rank]`; only the forward program is used."""
    layout = Layout("rows", _runs(rows), Layout("others", _runs(others)))
    return make_plan(
        sum(rows),
        world=len(rows),
        heads=1,
        head_dim=dim,
        mask=full(),
        layout=layout,
        schedule=schedule,
        training=False,
        q_offset=0,
    )


def _runs(counts: Sequence[int]) -> tuple[tuple[Span, ...], ...]:
    starts = [sum(counts[:n]) for n in range(len(counts))]
    return tuple((Span(start, count),) if count else () for start, count in zip(starts, counts, strict=True))
