"""Runs one rank's program step by step: receives, sends, computes and merges, in both passes.

It knows no ranks, masks, kernels or schedules. `BlockOps` defines what a block consists of, how a tile is computed and how
partial results merge; a `Port` moves the bytes. The engine waits only for messages in their arrival step, so all others travel
during compute. Partial results of one accumulator are merged several at once, because merging is bound by memory bandwidth:
each merge reads and writes the fp32 sum, however many parts it adds.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from ringattn.comm.transport import Port
from ringattn.comm.wire_format import Wire
from ringattn.schedule.program import MERGED_AT_ONCE, Item, Message, Step
from ringattn.schedule.program import TileBatch as TileBatch

Payload = tuple[Tensor, ...]


class BlockOps(Protocol):
    """The block operations of one rank in one pass. A share is the part of an accumulator that some tiles contribute."""

    device: torch.device

    def own(self, item: Item) -> Payload:
        """The input block `item`, which this rank owns."""

    def wire(self, items: tuple[Item, ...]) -> Wire:
        """The layout of a message that carries `items`, wherever it comes from."""

    def operand(self, item: Item, payload: Payload) -> Payload:
        """Input block `item` as `compute` takes it; called once for each block that this rank computes with."""

    def compute(self, tiles: TileBatch, q: Sequence[Payload], kv: Sequence[Payload]) -> Mapping[Item, Any]:
        """Compute some tiles at once from their blocks; returns their share of each accumulator."""

    def merge(self, item: Item, shares: Sequence[Any]) -> Any:
        """Merge all `shares` of one accumulator into a new one. Does not write into any of them."""

    def ready(self, item: Item, shares: Sequence[Any]) -> Payload | None:
        """The tensors of an accumulator to send, if they need no merge; else None, and `write` merges into the message."""

    def write(self, item: Item, shares: Sequence[Any], slots: Sequence[Tensor]) -> None:
        """Merge all `shares` of one accumulator into its place in a message."""

    def arrived(self, item: Item, payload: Payload) -> Any:
        """The share that was received as `payload`."""


def span(*name: object) -> AbstractContextManager[Any]:
    """A named range in a profile."""
    return record_function("/".join(map(str, ("ringattn", *name))))


def profiling() -> bool:
    """Whether a profiler of torch is recording."""
    return bool(torch._C._autograd._profiler_enabled())


def run(
    program: Sequence[Step], ops: BlockOps, port: Port, resident: dict[Item, Payload] | None = None
) -> Generator[None, None, dict[Item, list[Any]]]:
    """Run `program`; returns the shares of every accumulator that ends here. Yields when a simulated peer must go first.

    `resident`: inputs that are on this rank already; afterwards those that have not been released.
    """
    resident = {} if resident is None else resident
    profiled = profiling()
    totals: dict[Item, list[Any]] = {}
    buffers: dict[Message, Tensor] = {}
    operands: dict[Item, Payload] = {}
    as_received: dict[Item, Tensor] = {}  # messages of a single input block, forwarded without being packed again

    def add(item: Item, share: Any) -> None:
        shares = totals.setdefault(item, [])
        if len(shares) == MERGED_AT_ONCE:
            shares[:] = [ops.merge(item, shares)]
        shares.append(share)

    def read(item: Item) -> Payload:
        payload = resident.get(item)
        if payload is None:
            payload = resident[item] = ops.own(item)
        return payload

    def operand(item: Item) -> Payload:
        payload = operands.get(item)
        if payload is None:
            payload = operands[item] = ops.operand(item, read(item))
        return payload

    def leaving(item: Item) -> Payload:
        payload = read(item._replace(new=False))
        # Of an item that is `new` since forward only the last fields are sent, see `wire_fields`.
        return payload[len(payload) - len(ops.wire((item,)).specs) :] if item.new else payload

    def outgoing(message: Message) -> Tensor:
        if len(message.items) == 1 and message.items[0] in as_received:
            return as_received[message.items[0]]
        wire = ops.wire(message.items)
        shares = {item: totals.pop(item) for item in message.items if item.kind.moved}
        parts = [ops.ready(item, shares[item]) if item.kind.moved else leaving(item) for item in message.items]
        tensors = [tensor for part in parts if part is not None for tensor in part]
        if len(tensors) == len(wire.specs):
            return wire.pack(tensors)
        buffer = wire.empty(ops.device)
        slots = wire.views(buffer)
        for item, part in zip(message.items, parts, strict=True):
            own, slots = slots[: len(ops.wire((item,)).specs)], slots[len(ops.wire((item,)).specs) :]
            if part is None:
                ops.write(item, shares[item], own)
            else:
                for slot, tensor in zip(own, part, strict=True):
                    slot.copy_(tensor)
        return buffer

    def receive(message: Message, buffer: Tensor) -> None:
        tensors = ops.wire(message.items).views(buffer)
        single = len(message.items) == 1
        for item in message.items:
            count = len(tensors) if single else len(ops.wire((item,)).specs)
            payload, tensors = tuple(tensors[:count]), tensors[count:]
            if item.kind.moved:
                add(item, ops.arrived(item, payload))
                continue
            if single:
                as_received[item] = buffer
            if item.new:
                full = item._replace(new=False)
                kept = len(ops.wire((full,)).specs) - count  # fields that have stayed here since forward
                resident[full] = (*resident[full][:kept], *payload)
            else:
                resident[item] = payload

    def arrive(step: Step) -> Generator[None, None, None]:
        for message in step.arrival:
            handed_over = yield from port.wait(message)
            buffer = buffers.pop(message)
            if message.dst == port.rank:
                receive(message, buffer if handed_over is None else handed_over)
            del buffer, handed_over  # else they would keep its memory until the next message

    def depart(step: Step) -> None:
        for message in step.post:
            sends = message.src == port.rank
            buffers[message] = outgoing(message) if sends else port.allocate(ops.wire(message.items), ops.device)
        port.post([(message, buffers[message]) for message in step.post])

    def compute(tiles: TileBatch) -> None:
        q, kv = ([operand(item) for item in items] for items in tiles.inputs)
        for item, share in ops.compute(tiles, q, kv).items():
            add(item, share)

    for step in program:
        if profiled:
            yield from _in_spans(step, arrive, depart, compute)
        else:
            if step.arrival:
                yield from arrive(step)
            if step.post:
                depart(step)
            for tiles in step.tiles:
                compute(tiles)
        for item in step.release:
            for blocks in (resident, operands, as_received):
                blocks.pop(item, None)
            as_received.pop(item._replace(new=True), None)
    return totals


def _in_spans(step: Step, arrive: Any, depart: Any, compute: Any) -> Generator[None, None, None]:
    """Run a step with a named range in the profile for each of its parts."""
    if step.arrival:
        with span(step, "wait"):
            yield from arrive(step)
    if step.post:
        with span(step, "post"):
            depart(step)
    for tiles in step.tiles:
        with span(step, tiles):
            compute(tiles)
