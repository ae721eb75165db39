"""Exchanges rows between all ranks: a differentiable all-to-all over the transports that schedules use.

Both ends know beforehand how many rows each rank sends to each other rank, so only rows travel, empty messages are left out,
and the rows that a rank keeps are not sent. All ranks may live in one process (see `simulated`), so arguments and results are
lists with one entry for each rank that the transport hosts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.comm.transport import Port, Transport
from ringattn.schedule.program import Message

Counts = Sequence[int]  # of rows, for each rank of the world


def exchange_rows(
    rows: Sequence[Tensor], sent: Sequence[Counts], received: Sequence[Counts], transport: Transport
) -> list[Tensor]:
    """Send each rank its rows and return the received ones. Differentiable: backward returns every gradient to its sender.

    rows: one tensor (rows, ...) for each hosted rank, ordered by destination, `sent[n][dst]` rows for each; dtype and the other
    dimensions are the same on all ranks. Returns the received rows ordered by source, `received[n][src]` from each.
    """
    return list(_ExchangeRows.apply(sent, received, transport, *rows))


def all_gather_rows(rows: Sequence[Tensor], counts: Counts, transport: Transport) -> list[list[Tensor]]:
    """Gather the rows of all ranks on every rank; rank r has `counts[r]` of them. No gradient."""
    world = len(counts)
    sent = [[counts[rank]] * world for rank in transport.ranks]
    copies = [torch.cat([own.detach()] * world) for own in rows]
    return [list(gathered.split(list(counts))) for gathered in exchange_rows(copies, sent, [counts] * len(rows), transport)]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: Sequence[Counts], received: Sequence[Counts], transport: Transport, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sent, ctx.received, ctx.transport = sent, received, transport
        return _exchange(rows, sent, received, transport)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (
            None,
            None,
            None,
            *_ExchangeRows.apply(ctx.received, ctx.sent, ctx.transport, *grads),
        )  # linear: differentiable again


def _exchange(
    rows: Sequence[Tensor], sent: Sequence[Counts], received: Sequence[Counts], transport: Transport
) -> tuple[Tensor, ...]:
    ports = transport.ports("rows to other ranks")
    return tuple(transport.drive([_exchange_on_rank(*of_rank) for of_rank in zip(rows, sent, received, ports, strict=True)]))


def _exchange_on_rank(rows: Tensor, sent: Counts, received: Counts, port: Port) -> Generator[None, None, Tensor]:
    """Post all transfers of one rank at once, nearest neighbours first, and wait for them."""
    world, own = len(sent), port.rank
    parts = rows.contiguous().split(list(sent))
    received_parts = [rows.new_empty(count, *rows.shape[1:]) for count in received]
    received_parts[own] = parts[own]
    transfers = []
    for peer in ((own + distance) % world for distance in range(1, world)):
        for src, dst, tensor in ((own, peer, parts[peer]), (peer, own, received_parts[peer])):
            if tensor.numel():
                transfers.append((Message(src, dst, 0, 1, ()), tensor.reshape(-1).view(torch.uint8)))
    if transfers:
        port.post(transfers)
    for message, _ in transfers:
        yield from port.wait(message)
    return torch.cat(received_parts)
