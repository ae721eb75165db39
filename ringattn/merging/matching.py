"""Similarity that is the same number everywhere: directions as whole numbers, whose products no order of summation can change.

Which rows merge hangs on comparing similarities, and ties are common (padding, repeated tokens). A matrix product in floating
point gives other last bits for other shapes, so one process and eight ranks would merge different rows. Here a row's direction
is rounded to whole numbers of at most 2^20; products of up to 4,096 of them are whole numbers below 2^53, which fp64 holds
exactly: cosine similarity to 2e-5 or better, and the same bits for every tiling, order, thread count and device.

Bipartite soft matching, on any number of sequences at once: who may merge, whom each is most like, and which pairs do.

    sides    every other row is in A, the rest in B; or, by energy, the rows most like all others, alternately in A and B
    best     for each row of A the most similar row of B, the first of them if several are
    chosen   the `remove` most similar pairs, the first of them if several are; or all above a threshold
    labels   a row of A that is chosen takes the name of its row of B

Bolya et al. 2022, https://arxiv.org/abs/2210.09461 (ToMe); energy: Tran et al. 2024, https://arxiv.org/abs/2405.16148 (PiToMe).
Similarities are whole numbers (see `fixed_point`), so all of this gives the same answer wherever and in whatever parts it is
computed. Rows are along the last dimension; pure functions, no communication.

Every row against every other, over ranks: what a matching policy needs, run by the engine that runs attention.

The schedule, the program and the transport are those of attention; only the payload is another. Instead of queries, keys and
values directions travel (see `fixed_point`), and instead of (out, lse) merged by log-sum-exp a state merged by its own rule:

    Best      (similarity, position) of the most similar row; the larger wins, and of equals the first
    Energy    the sum of energies

Both are whole numbers and both rules are associative, commutative and exact, so any schedule on any number of ranks gives the
answer of one process, bit for bit.
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

ONE = 1 << 20  # length of a direction
SAME = ONE * ONE  # similarity of a direction with itself, up to rounding
NONE = -(1 << 62)  # below every similarity
MOST_CHANNELS = 4096  # squares of so many numbers of 20 bits sum up to less than 2^53


def fixed_point(metric: Tensor) -> Tensor:
    """Directions of the rows of `metric`, (..., dim): whole numbers in int32. A row of zeros, or one with NaN or inf, is 0."""
    if metric.shape[-1] > MOST_CHANNELS:
        raise InputError(
            f"metric has {metric.shape[-1]} channels and similarity is exact for {MOST_CHANNELS}; use the mean over heads, or "
            "a projection"
        )
    x = metric.detach().double()
    largest = x.abs().amax(-1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    largest = largest.where(usable, 1)
    power = largest / torch.frexp(largest).mantissa  # of two: dividing by it brings the largest to [1/2, 1) without rounding
    x = (x.where(usable, 0) / power * ONE).round()  # squares of these sum up exactly, in any order
    length = x.square().sum(-1, keepdim=True).sqrt()
    return (x / length.clamp(min=1) * ONE).round().int()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(..., rows of a, rows of b): whole numbers in fp64, `SAME` times the cosine. a, b: from `fixed_point`."""
    return a.double() @ b.double().transpose(-1, -2)


NEITHER, A, B = 0, 1, 2
STEPS = 14  # bits to which similarity is rounded before its energy is looked up
ENERGY = 1 << 32  # one unit of energy: sums of 2^30 rows stay below 2^63


def alternate(index: Tensor, free: Tensor) -> Tensor:
    """Sides by the row's number in its window or sequence: even rows to A, odd ones to B. free: bool, who may merge."""
    return torch.where(index % 2 == 0, A, B).where(free, NEITHER)


def by_chance(numbers: Tensor, index: Tensor, free: Tensor, every: int = 2) -> Tensor:
    """Of every `every` rows in a row one, drawn by `numbers`, is in B and the rest in A; as tomesd does in two dimensions."""
    *lead, rows = free.shape
    cells = -(-rows // every)
    padded = torch.nn.functional.pad(numbers.where(free, -1.0), (0, cells * every - rows), value=-1.0)
    winner = padded.view(*lead, cells, every).argmax(-1, keepdim=True)
    chosen = torch.zeros(*lead, cells, every, dtype=torch.bool, device=free.device).scatter(-1, winner, True)
    return torch.where(chosen.view(*lead, cells * every)[..., :rows], B, A).where(free, NEITHER)


def by_energy(energy: Tensor, free: Tensor, pairs: Tensor) -> Tensor:
    """The 2 * `pairs` rows of most energy, alternately in A and B; all others stay as they are."""
    ranked = energy.where(free, NONE).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(ranked).scatter(-1, ranked, torch.arange(ranked.shape[-1], device=ranked.device).expand_as(ranked))
    return torch.where(place % 2 == 0, A, B).where(free & (place < 2 * pairs.unsqueeze(-1)), NEITHER)


def energies(similarities: Tensor, margin: float) -> Tensor:
    """PiToMe's energy of each pair: the similarity itself above the margin, exp(similarity - margin) - 1 below.

    similarities: from `fixed_point.similarity`. Returns int64, in parts of `ENERGY`.
    """
    table = _table(margin).to(similarities.device)
    return table[((similarities / SAME).clamp(-1, 1) * (1 << STEPS)).round().long() + (1 << STEPS)]


@lru_cache(maxsize=8)
def _table(margin: float) -> Tensor:
    """By similarity from -1 to 1: looked up and not computed, since exp has other last bits on other devices."""
    values = (n / (1 << STEPS) for n in range(-(1 << STEPS), (1 << STEPS) + 1))
    return torch.tensor([round((x if x >= margin else exp(x - margin) - 1) * ENERGY) for x in values])


def best(a: Tensor, b: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `a` its largest similarity to a row of `b`, int64, and where that is: the first such of `positions`.

    a, b: from `fixed_point`, (..., rows, dim); positions: int64, of the rows of b, below 0 for one that is not to be had.
    """
    found = similarity(a, b).masked_fill((positions < 0).unsqueeze(-2), float(NONE))
    most = found.amax(-1)
    where = positions.unsqueeze(-2).expand_as(found).where(found == most.unsqueeze(-1), torch.iinfo(torch.int64).max).amin(-1)
    return most.long(), where


def chosen(scores: Tensor, pairs: Tensor | None, threshold: float | None) -> Tensor:
    """bool: which rows of A merge. scores: int64, from `best`, `NONE` for rows that are not in A; pairs: how many at most."""
    taken = scores > NONE
    if threshold is not None:
        taken &= scores > int(threshold * SAME)
    if pairs is not None:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(scores.shape[-1], device=scores.device) < pairs.unsqueeze(-1)
        taken &= torch.zeros_like(taken).scatter(-1, ranked, first.expand_as(ranked))
    return taken


BLOCK = 1024  # rows compared at once with all of a tile's others, so that no matrix of a whole tile exists


class Matching(ABC):
    """One rank's part. rows: (batch, rows, dim) directions; others: the same for what they are compared with.

    positions: int64 (batch, others), below 0 for one that is none.
    """

    state: int  # numbers in the answer to a row

    def __init__(self, plan: Plan, rank: int, rows: Tensor, others: Tensor, positions: Tensor) -> None:
        self.plan, self.rank, self.device = plan, rank, rows.device
        self.of = {Kind.Q: (rows,), Kind.KV: (others, positions)}

    @abstractmethod
    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        """int64 (batch, rows, state): of these rows against these others."""

    def own(self, item: Item) -> Payload:
        block = self.plan.forward[item.head_group].block(item.kind, item.index)
        return tuple(tensor[:, block.start : block.stop] for tensor in self.of[item.kind])

    def wire(self, items: tuple[Item, ...]) -> Wire:
        return Wire(spec for item in items for spec in self._specs(item))

    def _specs(self, item: Item) -> Sequence[Spec]:
        count = self.plan.forward[item.head_group].block(item.kind, item.index).rows
        if item.kind is Kind.Q_ACC:
            return [Spec((len(self.of[Kind.Q][0]), count, self.state), torch.int64)]
        return [Spec((t.shape[0], count, *t.shape[2:]), t.dtype) for t in self.of[item.kind]]

    def compute(self, tiles: TileBatch, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Payload]:
        others, positions = (torch.cat(parts, dim=1) for parts in zip(*kv, strict=True))
        found: dict[Item, Payload] = {}
        for index, (rows,) in zip(tiles.i, q, strict=True):
            parts = [self.compare(some, others, positions) for some in rows.split(BLOCK, dim=1)]
            found[Item(tiles.head_group, Kind.Q_ACC, index)] = (torch.cat(parts, dim=1),)
        return found

    def operand(self, item: Item, payload: Payload) -> Payload:
        return payload

    @abstractmethod
    def both(self, total: Payload, share: Payload) -> Payload:
        """Two answers to the same rows as one."""

    def merge(self, item: Item, shares: Sequence[Payload]) -> Payload:
        return reduce(self.both, shares)

    def ready(self, item: Item, shares: Sequence[Payload]) -> Payload:
        return self.merge(item, shares)

    def write(self, item: Item, shares: Sequence[Payload], slots: Sequence[Tensor]) -> None:
        for slot, tensor in zip(slots, self.merge(item, shares), strict=True):
            slot.copy_(tensor)

    def arrived(self, item: Item, payload: Payload) -> Payload:
        return payload

    def result(self, gathered: dict[Item, list[Payload]]) -> Tensor:
        """int64 (batch, rows, state), of this rank's rows in order."""
        blocks = sorted((self.plan.forward[item.head_group].block(item.kind, item.index).start, item) for item in gathered)
        nothing = self.of[Kind.Q][0].new_empty(len(self.of[Kind.Q][0]), 0, self.state, dtype=torch.int64)
        return torch.cat([nothing, *(self.merge(item, gathered[item])[0] for _, item in blocks)], dim=1)


class Best(Matching):
    """The most similar of all others, and where it is."""

    state = 2

    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        return torch.stack(best(rows, others, positions), dim=-1)

    def both(self, total: Payload, share: Payload) -> Payload:
        (a,), (b,) = total, share
        first = (a[..., 0] > b[..., 0]) | ((a[..., 0] == b[..., 0]) & (a[..., 1] <= b[..., 1]))
        return (a.where(first.unsqueeze(-1), b),)


class Energy(Matching):
    """The sum of energies over all others."""

    state = 1

    def __init__(self, plan: Plan, rank: int, rows: Tensor, others: Tensor, positions: Tensor, *, margin: float) -> None:
        super().__init__(plan, rank, rows, others, positions)
        self.margin = margin

    def compare(self, rows: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        return (
            energies(similarity(rows, others), self.margin).masked_fill((positions < 0).unsqueeze(-2), 0).sum(-1, keepdim=True)
        )

    def both(self, total: Payload, share: Payload) -> Payload:
        return (total[0] + share[0],)


def run_matching(works: Sequence[Matching], plan: Plan, transport: Transport) -> list[Tensor]:
    """The answers to the rows of each rank that `transport` hosts."""
    ports = transport.ports("matching")
    runs = [run(plan.program(work.rank, backward=False), work, port) for work, port in zip(works, ports, strict=True)]
    return [work.result(gathered) for work, gathered in zip(works, transport.drive(runs), strict=True)]


def plan_for(rows: Sequence[int], others: Sequence[int], dim: int, schedule: str) -> Plan:
    """How `rows[rank]` rows of each rank meet `others[rank]`: a plan of which only the forward program is used."""
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
