"""Rows from every rank to every other, as many as each has for it: an all-to-all over the transports of schedules.

Who sends how many rows to whom is known to both ends beforehand, so nothing but the rows travels, nothing at all where there
are none, and what a rank keeps is not sent. All ranks may live in one process (see `simulated`), so everything here comes in
lists, one entry for each rank that the transport hosts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.comm.transport import Port, Transport
from ringattn.schedule.program import Message

Counts = Sequence[int]  # of rows, for each rank of the world


def swap(rows: Sequence[Tensor], sent: Sequence[Counts], taken: Sequence[Counts], transport: Transport) -> list[Tensor]:
    """Differentiable: backward takes every gradient the same way back.

    rows: of each hosted rank (rows, ...), those for rank 0 first, `sent[n][dst]` for each; of the same dtype and shape beside
    the rows everywhere. Returns what came, those from rank 0 first, `taken[n][src]` from each.
    """
    return list(_Swap.apply(sent, taken, transport, *rows))


def everyone(rows: Sequence[Tensor], counts: Counts, transport: Transport) -> list[list[Tensor]]:
    """The rows of all ranks, on every rank; rank r has `counts[r]` of them. No gradient."""
    world = len(counts)
    sent = [[counts[rank]] * world for rank in transport.ranks]
    copies = [torch.cat([own.detach()] * world) for own in rows]
    return [list(came.split(list(counts))) for came in swap(copies, sent, [counts] * len(rows), transport)]


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: Sequence[Counts], taken: Sequence[Counts], transport: Transport, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sent, ctx.taken, ctx.transport = sent, taken, transport
        return _swapped(rows, sent, taken, transport)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_Swap.apply(ctx.taken, ctx.sent, ctx.transport, *grads)  # linear: differentiable again


def _swapped(
    rows: Sequence[Tensor], sent: Sequence[Counts], taken: Sequence[Counts], transport: Transport
) -> tuple[Tensor, ...]:
    ports = transport.ports("rows to other ranks")
    return tuple(transport.drive([_one(*of_rank) for of_rank in zip(rows, sent, taken, ports, strict=True)]))


def _one(rows: Tensor, sent: Counts, taken: Counts, port: Port) -> Generator[None, None, Tensor]:
    """One rank's part: everything is posted at once, nearest neighbours first, and waited for."""
    world, own = len(sent), port.rank
    parts = rows.contiguous().split(list(sent))
    came = [rows.new_empty(count, *rows.shape[1:]) for count in taken]
    came[own] = parts[own]
    transfers = []
    for peer in ((own + distance) % world for distance in range(1, world)):
        for src, dst, tensor in ((own, peer, parts[peer]), (peer, own, came[peer])):
            if tensor.numel():
                transfers.append((Message(src, dst, 0, 1, ()), tensor.reshape(-1).view(torch.uint8)))
    if transfers:
        port.post(transfers)
    for message, _ in transfers:
        yield from port.wait(message)
    return torch.cat(came)
