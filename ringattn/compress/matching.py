"""Every row against every other, over ranks: what a matching policy needs, run by the engine that runs attention.

The schedule, the program and the transport are those of attention; only the payload is another. Instead of queries, keys and
values directions travel (see `units`), and instead of (out, lse) merged by log-sum-exp a state merged by its own rule:

    Best      (similarity, position) of the most similar row; the larger wins, and of equals the first
    Energy    the sum of energies

Both are whole numbers and both rules are associative, commutative and exact, so any schedule on any number of ranks gives the
answer of one process, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ringattn.comm.packing import Spec, Wire
from ringattn.comm.transport import Transport
from ringattn.compress.pairing import best, energies
from ringattn.compress.units import similarity
from ringattn.engine import Payload, run
from ringattn.layout import Layout, Span
from ringattn.mask import full
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Work

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
        block = self.plan.forward[item.lane].block(item.kind, item.index)
        return tuple(tensor[:, block.start : block.stop] for tensor in self.of[item.kind])

    def wire(self, items: tuple[Item, ...]) -> Wire:
        return Wire(spec for item in items for spec in self._specs(item))

    def _specs(self, item: Item) -> Sequence[Spec]:
        count = self.plan.forward[item.lane].block(item.kind, item.index).rows
        if item.kind is Kind.Q_ACC:
            return [Spec((len(self.of[Kind.Q][0]), count, self.state), torch.int64)]
        return [Spec((t.shape[0], count, *t.shape[2:]), t.dtype) for t in self.of[item.kind]]

    def compute(self, tiles: Work, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Payload]:
        others, positions = (torch.cat(parts, dim=1) for parts in zip(*kv, strict=True))
        found: dict[Item, Payload] = {}
        for index, (rows,) in zip(tiles.i, q, strict=True):
            parts = [self.compare(some, others, positions) for some in rows.split(BLOCK, dim=1)]
            found[Item(tiles.lane, Kind.Q_ACC, index)] = (torch.cat(parts, dim=1),)
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
        blocks = sorted((self.plan.forward[item.lane].block(item.kind, item.index).start, item) for item in gathered)
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


def meet(works: Sequence[Matching], plan: Plan, transport: Transport) -> list[Tensor]:
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
