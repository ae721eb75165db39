"""Moves rows between two layouts of one sequence: sums rows into slots, and copies slots back to rows.

Each row belongs to one slot or none, so the exchange is a sparse matrix and its transpose, sharded over ranks.
`sum_to_slots` adds rows into slots: each rank adds up its own rows of a slot and sends one row. `read_slots` gives every row
the content of its slot: each slot is sent once to every rank that has a row of it. Each is the backward of the other. What
stays on a rank is not sent; windows that divide shards send nothing.

Merging, unmerging and rebalancing are this exchange with different slots. Every rank knows where all rows and slots lie, so no
metadata is communicated.

`gather_rows` all-gathers integers or flags, one for each row, to the whole sequence on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn._validation import error_message
from ringattn.comm.all_to_all import all_gather_rows, exchange_rows
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, cannot_move
from ringattn.comm.select import transport_for
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor, resolve_group
from ringattn.execution.sharding import resident_positions, sequence_order
from ringattn.kernels.lse import accum_dtype
from ringattn.sequence.layout import Layout


class OwnerMap(NamedTuple):
    """For each position of a layout, the rank that holds it and its local row there: int64 (length,)."""

    rank: Tensor
    row: Tensor


@lru_cache(maxsize=8)  # two integers for each row; merging by content makes a new layout in every step
def owners(layout: Layout) -> OwnerMap:
    """The owner map of `layout`."""
    owner_map = OwnerMap(*torch.empty(2, layout.length, dtype=torch.int64))
    for rank in range(layout.world):
        own = resident_positions(layout, rank)
        owner_map.rank[own] = rank
        owner_map.row[own] = torch.arange(len(own))
    return owner_map


class SlotExchange:
    """One rank's part of the exchange between rows of layout `before` and slots of layout `after`.

    slots: int64 (batch, seq_len), for each row of the whole sequence its slot, or -1 for none. The same on every rank.
    """

    def __init__(self, slots: Tensor, before: Layout, after: Layout, rank: int) -> None:
        device, batch, capacity = slots.device, slots.shape[0], after.length
        row_owner, slot_owner = (OwnerMap(*(t.to(device) for t in owners(layout))) for layout in (before, after))
        self.rank, self.batch, self.rows, self.slots = rank, batch, before.rows(rank), after.rows(rank)
        world = before.world
        batch_index = torch.arange(batch, device=device)[:, None]
        owner = slot_owner.rank[slots]  # unused for rows without a slot
        used = slots >= 0

        own = resident_positions(before, rank).to(device)
        key = (owner[:, own] * batch + batch_index) * capacity + slots[:, own]
        self.has_slot = used[:, own]  # (batch, rows): whether each of this rank's rows has a slot
        keys, self.send_slot = key[self.has_slot].unique(return_inverse=True)
        self.send_counts = torch.bincount(keys // (batch * capacity), minlength=world).tolist()

        mine = used & (owner == rank)
        keys = ((row_owner.rank * batch + batch_index) * capacity + slots)[mine].unique()
        batch_index, slot = keys // capacity % batch, keys % capacity
        self.recv_slots = batch_index * self.slots + slot_owner.row[slot]
        self.recv_counts = torch.bincount(keys // (batch * capacity), minlength=world).tolist()


def sum_to_slots(exchanges: Sequence[SlotExchange], rows: Sequence[Tensor], transport: Transport) -> list[Tensor]:
    """Sums rows into slots, 0 for an empty slot. rows: (batch, rows, dim); returns (batch, slots, dim), for each rank that
    `transport` hosts. Sums are computed and sent in fp32 (fp64 for fp64; integers unchanged)."""
    outgoing = []
    for exchange, own in zip(exchanges, rows, strict=True):
        of_rows = own.to(_sum_dtype(own.dtype))[exchange.has_slot]
        outgoing.append(of_rows.new_zeros(sum(exchange.send_counts), own.shape[-1]).index_add(0, exchange.send_slot, of_rows))
    received = exchange_rows(
        outgoing, [exchange.send_counts for exchange in exchanges], [exchange.recv_counts for exchange in exchanges], transport
    )
    return [
        parts.new_zeros(r.batch * r.slots, parts.shape[-1])
        .index_add(0, r.recv_slots, parts)
        .unflatten(0, (r.batch, r.slots))
        .to(own.dtype)
        for r, parts, own in zip(exchanges, received, rows, strict=True)
    ]


def read_slots(exchanges: Sequence[SlotExchange], slots: Sequence[Tensor], transport: Transport) -> list[Tensor]:
    """Copies each slot to its rows, 0 for a row without a slot. slots: (batch, slots, dim); returns (batch, rows, dim)."""
    outgoing = [own.flatten(0, 1)[exchange.recv_slots] for exchange, own in zip(exchanges, slots, strict=True)]
    received = exchange_rows(
        outgoing, [exchange.recv_counts for exchange in exchanges], [exchange.send_counts for exchange in exchanges], transport
    )
    values = []
    for exchange, parts in zip(exchanges, received, strict=True):
        of_rows = parts.new_zeros(exchange.batch, exchange.rows, parts.shape[-1])
        values.append(of_rows.masked_scatter(exchange.has_slot.unsqueeze(-1), parts[exchange.send_slot]))
    return values


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return accum_dtype(dtype) if dtype.is_floating_point else dtype


def gather_rows(flags: Tensor, layout: Layout, group: Group | None = None) -> Tensor:
    """All-gathers `flags`, bool or int64 (batch, rows), to (batch, seq_len) in sequence order; collective.

    For policies that depend on content: `segments(gather_rows(tokens == SPACE, plan.layout))`.

    Raises:
        InputError: flags do not fit this rank's rows. Raised on every rank.
        MismatchError: ranks passed different dtypes or layouts. Raised on every rank.
    """
    return gather_named_rows("flags", flags, (torch.bool, torch.int64), layout, group)


def gather_named_rows(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, group: Group | None) -> Tensor:
    """`gather_rows` for a caller whose argument is called `name`."""
    process_group, rank = resolve_group(layout, group, Layout)
    fields: dict[str, object] = {"call": "gather_rows"}
    problem = error_message(lambda: _check(name, flags, dtypes, layout, rank)) or cannot_move(process_group, name, flags)
    if problem is None:
        fields |= {"layout": layout.digest, f"dtype of {name}": flags.dtype, "batch": flags.shape[0]}
    agree(process_group, fields, problem, device=flags.device if isinstance(flags, Tensor) else None)
    return gather_all_rows([flags], layout, transport_for(process_group))[0]


def _check(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, rank: int) -> None:
    if as_strided_tensor(name, flags).ndim != 2 or flags.shape[1] != layout.rows(rank) or flags.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{name}: {flags.dtype} of shape {tuple(flags.shape)}; give {kinds} (batch, rows) with the "
            f"{layout.rows(rank)} rows that the layout gives rank {rank}"
        )


def gather_all_rows(rows: Sequence[Tensor], layout: Layout, transport: Transport) -> list[Tensor]:
    """All-gathers (batch, rows, ...) to (batch, seq_len, ...) in sequence order, on each rank that `transport` hosts."""
    counts = [layout.rows(rank) for rank in range(layout.world)]
    parts = all_gather_rows([own.transpose(0, 1).contiguous() for own in rows], counts, transport)
    order = sequence_order(layout).to(rows[0].device)
    return [torch.cat(of_ranks)[order].transpose(0, 1).contiguous() for of_ranks in parts]
