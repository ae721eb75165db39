"""The way between rows in one layout and slots in another, each row belonging to one slot or none: a sparse matrix and its
transpose, cut over ranks.

`up` adds rows into slots: each rank first adds what it has for a slot, then sends that one row. `down` gives every row what is
in its slot: each slot is sent once to every rank that has a row of it. Backward of one is the other. What stays on a rank is
not sent; with windows that divide shards nothing is.

Merging, unmerging, handing on what is known so far and rebalancing are all this, with different slots. Every rank knows where
all rows and slots lie, so nobody asks anybody for anything.

What each rank knows of its rows, told to all: whole numbers or flags, one for each row of the whole sequence.
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
    """Of every position of a layout, the rank that has it and its local row there: int64 (length,)."""

    rank: Tensor
    row: Tensor


@lru_cache(maxsize=8)  # each holds two numbers a row, and where merging goes by content there is a new one in every step
def owners(layout: Layout) -> OwnerMap:
    """Where every position of `layout` is."""
    found = OwnerMap(*torch.empty(2, layout.length, dtype=torch.int64))
    for rank in range(layout.world):
        own = resident_positions(layout, rank)
        found.rank[own] = rank
        found.row[own] = torch.arange(len(own))
    return found


class SlotExchange:
    """One rank's part of the way between rows of `before` and slots of `after`.

    slots: int64 (batch, seq_len), for each row of the whole sequence its slot, or -1 for none. The same on every rank.
    """

    def __init__(self, slots: Tensor, before: Layout, after: Layout, rank: int) -> None:
        device, batch, capacity = slots.device, slots.shape[0], after.length
        row_home, slot_home = (OwnerMap(*(t.to(device) for t in owners(layout))) for layout in (before, after))
        self.rank, self.batch, self.rows, self.slots = rank, batch, before.rows(rank), after.rows(rank)
        world = before.world
        which = torch.arange(batch, device=device)[:, None]
        owner = slot_home.rank[slots]  # of a row without slot it is never read
        used = slots >= 0

        own = resident_positions(before, rank).to(device)
        key = (owner[:, own] * batch + which) * capacity + slots[:, own]
        self.leaving = used[:, own]  # (batch, rows): which of this rank's rows have a slot
        parcels, self.parcel = key[self.leaving].unique(return_inverse=True)
        self.sent = torch.bincount(parcels // (batch * capacity), minlength=world).tolist()

        mine = used & (owner == rank)
        parcels = ((row_home.rank * batch + which) * capacity + slots)[mine].unique()
        of_batch, slot = parcels // capacity % batch, parcels % capacity
        self.target = of_batch * self.slots + slot_home.row[slot]
        self.taken = torch.bincount(parcels // (batch * capacity), minlength=world).tolist()


def up(routes: Sequence[SlotExchange], rows: Sequence[Tensor], transport: Transport) -> list[Tensor]:
    """The sum over each slot's rows, 0 where it has none. rows: (batch, rows, dim); returns (batch, slots, dim), for each rank
    that `transport` hosts. Sums are made and sent in fp32 (fp64 for fp64; whole numbers as they are)."""
    leaving = []
    for exchange, own in zip(routes, rows, strict=True):
        of_rows = own.to(_wide(own.dtype))[exchange.leaving]
        leaving.append(of_rows.new_zeros(sum(exchange.sent), own.shape[-1]).index_add(0, exchange.parcel, of_rows))
    came = exchange_rows(leaving, [exchange.sent for exchange in routes], [exchange.taken for exchange in routes], transport)
    return [
        parts.new_zeros(r.batch * r.slots, parts.shape[-1])
        .index_add(0, r.target, parts)
        .unflatten(0, (r.batch, r.slots))
        .to(own.dtype)
        for r, parts, own in zip(routes, came, rows, strict=True)
    ]


def down(routes: Sequence[SlotExchange], slots: Sequence[Tensor], transport: Transport) -> list[Tensor]:
    """What is in each row's slot, 0 for a row without one. slots: (batch, slots, dim); returns (batch, rows, dim)."""
    leaving = [own.flatten(0, 1)[exchange.target] for exchange, own in zip(routes, slots, strict=True)]
    came = exchange_rows(leaving, [exchange.taken for exchange in routes], [exchange.sent for exchange in routes], transport)
    found = []
    for exchange, parts in zip(routes, came, strict=True):
        of_rows = parts.new_zeros(exchange.batch, exchange.rows, parts.shape[-1])
        found.append(of_rows.masked_scatter(exchange.leaving.unsqueeze(-1), parts[exchange.parcel]))
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return accum_dtype(dtype) if dtype.is_floating_point else dtype


def gather_rows(flags: Tensor, layout: Layout, group: Group | None = None) -> Tensor:
    """(batch, seq_len) on every rank, in the order of the sequence; collective. flags: bool or int64 (batch, rows).

    For policies that go by what rows hold: `segments(gather_rows(tokens == SPACE, plan.layout))`.

    Raises:
        InputError: flags are not for the rows of this rank. Raised on every rank.
        MismatchError: ranks came with different dtypes or layouts. Raised on every rank.
    """
    return tell_as("flags", flags, (torch.bool, torch.int64), layout, group)


def tell_as(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, group: Group | None) -> Tensor:
    """`gather_rows` for an argument that is called `name` where it comes from."""
    process_group, rank = resolve_group(layout, group, Layout)
    said: dict[str, object] = {"call": "tell"}
    problem = error_message(lambda: _check(name, flags, dtypes, layout, rank)) or cannot_move(process_group, name, flags)
    if problem is None:
        said |= {"layout": layout.digest, f"dtype of {name}": flags.dtype, "batch": flags.shape[0]}
    agree(process_group, said, problem, device=flags.device if isinstance(flags, Tensor) else None)
    return told([flags], layout, transport_for(process_group))[0]


def _check(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, rank: int) -> None:
    if as_strided_tensor(name, flags).ndim != 2 or flags.shape[1] != layout.rows(rank) or flags.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{name}: {flags.dtype} of shape {tuple(flags.shape)}; give {kinds} (batch, rows) with the "
            f"{layout.rows(rank)} rows that the layout gives rank {rank}"
        )


def told(found: Sequence[Tensor], layout: Layout, transport: Transport) -> list[Tensor]:
    """(batch, rows, ...) of every rank as (batch, seq_len, ...), on each rank that `transport` hosts."""
    counts = [layout.rows(rank) for rank in range(layout.world)]
    parts = all_gather_rows([own.transpose(0, 1).contiguous() for own in found], counts, transport)
    order = sequence_order(layout).to(found[0].device)
    return [torch.cat(of_ranks)[order].transpose(0, 1).contiguous() for of_ranks in parts]
