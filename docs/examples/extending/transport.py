"""Adds a transport: messages are values in a key-value store on rank 0's host. Slow, and all there is to know of transports."""

import os
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn import CommError
from ringattn.comm import Message, Port, register


class StoreTransport:
    """Hosts this process's rank of `group`; made once for each group, on all of its ranks together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = (dist.get_rank(group),)
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), [0]
        if self.ranks == (0,):
            self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self.store.port]
        dist.broadcast_object_list(port, src=dist.get_global_rank(group, 0), group=group)
        if self.ranks != (0,):
            self.store = dist.TCPStore(host, port[0], is_master=False)
        self.messages: Counter[tuple[int, int]] = Counter()  # so far on each link: both of its ends count alike

    def ports(self, label: str) -> list["StorePort"]:
        return [StorePort(self, label)]

    def drive(self, runs: Sequence[Generator[None, None, Any]]) -> list[Any]:
        """A real port blocks in `wait`, so the one run of this process goes from its beginning to its end."""
        (run,) = runs
        while True:
            try:
                next(run)
            except StopIteration as stop:
                return [stop.value]


class StorePort(Port):
    """This rank's end during one pass."""

    def __init__(self, transport: StoreTransport, label: str) -> None:
        self.rank, self.transport, self.label = transport.ranks[0], transport, label
        self.awaited: dict[Message, tuple[str, Tensor]] = {}

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        for message, buffer in transfers:  # in an order that is the same on all ranks, so numbers on a link agree
            link = message.src, message.dst
            self.transport.messages[link] += 1
            key = f"{message.src}/{message.dst}/{self.transport.messages[link]}"
            if message.src == self.rank:
                self.transport.store.set(key, bytes(_bytes_of(buffer).tolist()))
            else:
                self.awaited[message] = key, buffer

    def wait(self, message: Message) -> Generator[None, None, None]:
        if message in self.awaited:  # else it was sent: the store has a copy
            key, buffer = self.awaited.pop(message)
            try:
                arrived = self.transport.store.get(key)  # waits for it
                self.transport.store.delete_key(key)
            except dist.DistError as error:
                raise CommError(f"rank {self.rank}, {self.label}: {message} did not come: {error}") from error
            _bytes_of(buffer).copy_(torch.tensor(list(arrived), dtype=torch.uint8))
        yield from ()  # a generator that never yields: see `ringattn.comm.Port`


def _bytes_of(buffer: Tensor) -> Tensor:
    return buffer.view(-1).view(torch.uint8)


register("store", StoreTransport)
