"""Moves messages between ranks of one host through shared memory; the counterpart of `p2p`, with the same errors and deadlines.

All copying happens in `post` and `wait`, in the thread that calls them: a message that fits into the ring of its link (up to
64 MiB; rings grow to what is in flight) is available to the peer when `post` returns, and its receiver copies it out when it
waits. So nothing competes with compute for cores or for Python's lock. While a rank waits it also moves everything else it has
pending, in both directions, so ranks that all send first cannot block each other, whatever the size of their messages.

A wait ends with the message, at the deadline of the group, or at the end of the peer, whose sockets the system closes. After a
failure the transport of this group is closed on every rank, as with gloo. Tensors on GPUs are sent by `p2p`.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator, Mapping, Sequence
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.p2p import P2P, P2PPort
from ringattn.comm.shared_memory_link import Link, Transfer
from ringattn.faults.watchdog import comm_errors
from ringattn.schedule.program import Message


class Links:
    """The links of this rank to all others of a group. timeout: seconds that one wait may take."""

    def __init__(self, links: Mapping[int, Link], timeout: float) -> None:
        self.links, self.timeout = links, timeout
        self._calls = 0
        self._failed = ""
        self._poller = select.epoll()
        self._by_socket = {link.socket.fileno(): link for link in links.values()}
        self._watched = dict.fromkeys(self._by_socket, select.EPOLLIN)
        for number, events in self._watched.items():
            self._poller.register(number, events)

    def begin_call(self) -> int:
        """The number of the next call. Every rank counts the same calls; transfers left from an earlier one are dropped."""
        self._calls += 1
        for link in self.links.values():
            link.abandon()
        return self._calls

    def post(self, link: Link, transfer: Transfer, *, sends: bool) -> None:
        self._check()
        if sends:
            link.send(transfer)
            self._watch(link)
        else:
            link.receive(transfer)

    def wait(self, link: Link, transfer: Transfer) -> None:
        """Return when `transfer`, which was posted on `link`, is finished. Raises `RuntimeError` if it cannot be."""
        self._check()
        deadline = time.monotonic() + self.timeout
        try:
            for other in self.links.values():
                if other is link or other.ready or (other.lost and other.pending):
                    self._progress(other)
            while not transfer.finished:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise RuntimeError(f"Timed out waiting {self.timeout:g} s for rank {link.peer}")
                for number, _ in self._poller.poll(remaining):
                    self._progress(self._by_socket[number])
        except RuntimeError as error:
            self.close(str(error))
            raise

    def close(self, why: str = "the process has been forked") -> None:
        """End all connections of this process; peers that still wait for it notice at once."""
        self._failed = self._failed or why
        for link in self.links.values():
            link.close()
        self._poller.close()

    def _progress(self, link: Link) -> None:
        link.progress()
        self._watch(link)
        if link.lost and link.pending:
            raise RuntimeError(link.lost)

    def _watch(self, link: Link) -> None:
        """Poll for incoming frames, and for space for frames that could not be sent; not for a connection that has ended."""
        number = link.socket.fileno()
        wanted = 0 if link.lost else select.EPOLLIN | (select.EPOLLOUT if link.blocked else 0)
        if wanted == self._watched[number]:
            return
        if wanted:
            self._poller.modify(number, wanted)
        else:
            self._poller.unregister(number)
        self._watched[number] = wanted

    def _check(self) -> None:
        if self._failed:
            raise RuntimeError(f"shared memory of this group is no longer used since an earlier failure: {self._failed}")


class SharedMemory(P2P):
    """A transport that hosts this process's rank of `group`, all of whose ranks are on this host. Counts what `P2P` counts."""

    def __init__(self, group: dist.ProcessGroup, links: Links) -> None:
        super().__init__(group)
        self.links = links

    def ports(self, label: str) -> list[P2PPort]:
        self._label = label
        return [SharedMemoryPort(self, self.ranks[0], label)]


class SharedMemoryPort(P2PPort):
    """This rank's end during one pass. Message n from one rank to another is the nth that both of them post."""

    def __init__(self, transport: SharedMemory, rank: int, label: str) -> None:
        super().__init__(transport, rank, label)
        self._links = transport.links
        self._call = self._links.begin_call()
        self._numbers: dict[tuple[int, int], int] = {}
        self._transfers: dict[Message, tuple[Link, Transfer]] = {}

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        if transfers[0][1].device.type != "cpu":
            return super().post(transfers)
        for message, buffer in transfers:
            number = self._numbers[message.src, message.dst] = self._numbers.get((message.src, message.dst), -1) + 1
            sends = message.src == self.rank
            link = self._links.links[message.dst if sends else message.src]
            transfer = Transfer(self._call, number, buffer.view(torch.uint8))
            self._transfers[message] = link, transfer
            with comm_errors(self._doing, self._failed, message):
                self._links.post(link, transfer, sends=sends)
            if sends:
                self._transport.bytes_sent[message.src, message.dst] += buffer.nbytes
                self._transport.messages_sent[message.src, message.dst] += 1
        return None

    def wait(self, message: Message) -> Generator[None, None, None]:
        if message not in self._transfers:
            yield from super().wait(message)
            return
        begin = perf_counter()
        with comm_errors(self._doing, self._failed, message):
            link, transfer = self._transfers.pop(message)
            if not transfer.finished:
                self._links.wait(link, transfer)
        self._transport.waited(message, perf_counter() - begin)
