"""Executes a program: take in what is due, post what departs, compute, let go. Forward and backward are this one function.

It knows no ranks, masks, kernels or schedules. What a block consists of, how a tile is computed and how results merge is asked
of `Work`; how bytes travel is asked of a `Port`. Waiting happens only for what is due, so everything else travels beside
compute.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ringattn.comm.packing import Spec, pack, unpack
from ringattn.comm.transport import Port
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import Item, Message, Step
from ringattn.schedule.program import Work as Tiles

Payload = tuple[Tensor, ...]


class Work(Protocol):
    """One rank's part in one pass: what things are made of. An accumulator is a tuple of tensors too."""

    device: torch.device

    def own(self, item: Item) -> Payload:
        """The input block `item`, which this rank owns."""

    def specs(self, item: Item) -> Sequence[Spec]:
        """What `item` looks like on the wire, wherever it comes from."""

    def compute(self, tiles: Tiles, q: Sequence[Payload], kv: Sequence[Payload]) -> dict[Item, Any]:
        """Some tiles at once, given their blocks: the share of each accumulator they add to."""

    def merge(self, total: Any, share: Any) -> Any:
        """Both together; may reuse the memory of `total`."""

    def unship(self, item: Item, payload: Payload) -> Any:
        """The accumulator that came as `payload`."""


def run(
    program: Sequence[Step], work: Work, port: Port, held: dict[Item, Payload] | None = None
) -> Generator[None, None, dict[Item, Any]]:
    """Carry out `program`; returns the accumulators left at home. Yields whenever it has to wait for a simulated peer.

    `held` are inputs that are here already, and afterwards those that have not been let go.
    """
    held = {} if held is None else held
    gathered: dict[Item, Any] = {}
    buffers: dict[Message, Tensor] = {}

    def add(item: Item, share: Any) -> None:
        gathered[item] = work.merge(gathered[item], share) if item in gathered else share

    def read(item: Item) -> Payload:
        if item not in held:
            held[item] = work.own(item)
        return held[item]

    def outgoing(message: Message) -> Tensor:
        tensors: list[Tensor] = []
        specs: list[Spec] = []
        for item in message.items:
            fields = work.specs(item)
            payload = gathered.pop(item) if item.kind.moved else read(item._replace(new=False))
            tensors += payload[len(payload) - len(fields) :]  # of what is new only the end, see `payload`
            specs += fields
        return pack(tensors, specs)

    def take_in(message: Message, buffer: Tensor) -> None:
        specs = [work.specs(item) for item in message.items]
        tensors = unpack(buffer, [spec for group in specs for spec in group])
        for item, group in zip(message.items, specs, strict=True):
            payload, tensors = tuple(tensors[: len(group)]), tensors[len(group) :]
            whole = item._replace(new=False)
            if item.kind.moved:
                add(item, work.unship(item, payload))
            else:
                before = len(work.specs(whole)) - len(payload)  # fields that have stayed here and do not come again
                held[whole] = (*held[whole][:before], *payload) if item.new else payload

    for step in program:
        with record_function(f"ringattn/step{step.number}/wait"):
            for message in step.due:
                yield from port.wait(message)
                buffer = buffers.pop(message)
                if message.dst == port.rank:
                    take_in(message, buffer)
        with record_function(f"ringattn/step{step.number}/post"):
            for message in step.post:
                buffers[message] = outgoing(message) if message.src == port.rank else _room(message, work)
            if step.post:
                port.post([(message, buffers[message]) for message in step.post])
        for tiles in step.tiles:
            with record_function(f"ringattn/step{step.number}/{tiles}"):
                q = [read(Item(tiles.lane, Kind.Q, i)) for i in tiles.i]
                kv = [read(Item(tiles.lane, Kind.KV, j)) for j in tiles.j]
                for item, share in work.compute(tiles, q, kv).items():
                    add(item, share)
        for item in step.release:
            held.pop(item, None)
    return gathered


def _room(message: Message, work: Work) -> Tensor:
    nbytes = sum(spec.nbytes for item in message.items for spec in work.specs(item))
    return torch.empty(nbytes, dtype=torch.uint8, device=work.device)
