"""Connects all ranks of a group through shared memory, or returns on every rank why that is not possible.

Collective, through the group's store. Ranks first compare which kernel and network namespace they are in, then open a socket
to each other, and last pass each other some memory and read what the other has written there: a common host name, or two
containers with one address, prove nothing. Every step ends on all ranks with the same result, so they decide alike.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ringattn.comm.consistency import format_ranks
from ringattn.comm.shared_memory import Links
from ringattn.comm.shared_memory_link import Link, mapped, shared_memory

CONNECTING = 20.0  # seconds in which ranks connect to each other, once all have arrived
SECRET_BYTES = 16
MOST_PROBLEMS = 32  # reported at most


@dataclass
class Rendezvous:
    """Exchanges problems between the ranks of a group. store: of torch.distributed, used for this purpose only."""

    store: Any
    rank: int
    world: int

    def problems(self, step: str, own_problem: str) -> str:
        """The problems of all ranks in `step`, the same text on each, empty if there is none; waits for all ranks.

        Costs each rank a few requests to the store, however many ranks there are.
        """
        if own_problem:
            self.store.set(f"{step}/problem/{self.store.add(f'{step}/problems', 1)}", f"{self.rank}:{own_problem}")
        if self.store.add(f"{step}/ranks", 1) == self.world:
            count = min(self.store.add(f"{step}/problems", 0), MOST_PROBLEMS)
            self.store.set(f"{step}/answer", self._summary([f"{step}/problem/{n + 1}" for n in range(count)]) or "none")
        answer = str(self.store.get(f"{step}/answer").decode())
        return "" if answer == "none" else answer

    def _summary(self, keys: list[str]) -> str:
        """List each problem once, with the ranks that have it."""
        ranks: dict[str, list[int]] = {}
        for rank, _, text in sorted(self.store.get(key).decode().partition(":") for key in keys):
            ranks.setdefault(text, []).append(int(rank))
        return "; ".join(f"{format_ranks(sorted(of), self.world)}: {text}" for text, of in ranks.items())

    def compare(self, step: str, what: str, value: str) -> str:
        """Empty on every rank if all have the same `value`; else a text that names the ranks that differ from rank 0."""
        if self.rank == 0:
            self.store.set(f"{step}/of rank 0", value)
        first = self.store.get(f"{step}/of rank 0").decode()
        return self.problems(step, "" if value == first else f"{what} is {value}, on rank 0 {first}")


def connect(rendezvous: Rendezvous, timeout: float) -> Links | str:
    """Links to all other ranks, or on every rank the reason why there are none. timeout: of later waits, in seconds."""
    problem = host_mismatch(rendezvous)
    if problem:
        return problem
    links: dict[int, Link] = {}
    own_problem, opened = "", None
    with ExitStack() as stack:
        try:
            opened = _open(rendezvous, stack)
        except OSError as error:
            own_problem = f"no shared memory: {error}"
        problem = rendezvous.problems("open", own_problem)  # no rank waits for one that cannot be reached
        if problem or opened is None:
            return problem
        listener, memory = opened
        try:
            own_problem = _connect_all(rendezvous, listener, memory, links, time.monotonic() + min(timeout, CONNECTING))
        except OSError as error:
            own_problem = f"no connection for shared memory: {error}"
    problem = rendezvous.problems("connected", own_problem)
    if problem:
        for link in links.values():
            link.close()
        return problem
    return Links(links, timeout)


def host_mismatch(rendezvous: Rendezvous) -> str:
    """Text that names the ranks that are not on the host of rank 0, the same on every rank; empty if all are. Collective."""
    return rendezvous.compare("place", "this host", _host_identity())


def _host_identity() -> str:
    """The running kernel and the network namespace, which is the scope of abstract Unix socket names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
    except OSError as error:
        return f"{socket.gethostname()}, which Linux does not identify ({error})"


def _open(rendezvous: Rendezvous, stack: ExitStack) -> tuple[socket.socket, int]:
    """Open a listening socket, publish its name and this rank's secret, and put the secret into shared memory."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memory files (memfd_create)")
    name, secret = f"ringattn-{secrets.token_hex(SECRET_BYTES)}", secrets.token_bytes(SECRET_BYTES)
    memory = shared_memory(os.sysconf("SC_PAGE_SIZE"))
    stack.callback(os.close, memory)
    mapped(memory)[:SECRET_BYTES] = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    listener.bind(f"\0{name}")
    listener.listen(rendezvous.world)
    rendezvous.store.set(f"socket/{rendezvous.rank}", f"{name} {secret.hex()}")
    return listener, memory


def _connect_all(rendezvous: Rendezvous, listener: socket.socket, memory: int, links: dict[int, Link], deadline: float) -> str:
    """Fill `links`; returns an error message, empty if all is well. Raises `OSError` where the system refuses."""
    rank, world = rendezvous.rank, rendezvous.world
    published = {peer: rendezvous.store.get(f"socket/{peer}").decode().split() for peer in range(world)}
    secret = published[rank][1]

    def introduce(peer: int, connection: socket.socket) -> None:
        links[peer] = Link(peer, connection)
        _set_deadline(connection, deadline)
        socket.send_fds(connection, [f"{rank} {published[peer][1]}".encode()], [memory])

    for peer in range(rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _set_deadline(connection, deadline)
        connection.connect(f"\0{published[peer][0]}")
        introduce(peer, connection)
    while len(links) < world - 1:
        _set_deadline(listener, deadline)
        connection, _ = listener.accept()
        caller = _identified_peer(connection, secret, published, deadline)
        if caller is None or caller <= rank or caller in links:
            connection.close()  # not a rank of this group: socket names are public, secrets are not
        else:
            introduce(caller, connection)
    for peer in range(rank):
        if _identified_peer(links[peer].socket, secret, published, deadline) != peer:
            return f"rank {peer} has no access to the memory of this rank, or this rank none to its"
    for link in links.values():
        link.socket.setblocking(False)
    return ""


def _set_deadline(connection: socket.socket, deadline: float) -> None:
    connection.settimeout(max(0.01, deadline - time.monotonic()))


def _identified_peer(connection: socket.socket, secret: str, published: dict[int, list[str]], deadline: float) -> int | None:
    """The rank of the peer, if it knows this rank's secret and has passed memory that holds its own; else None."""
    _set_deadline(connection, deadline)
    data, descriptors, _, _ = socket.recv_fds(connection, 256, 1)
    try:
        sender, _, claimed = data.decode(errors="replace").partition(" ")
        if claimed != secret or not descriptors or not sender.isdigit() or int(sender) not in published:
            return None
        content = bytes(mapped(descriptors[0])[:SECRET_BYTES].tolist())
        return int(sender) if content.hex() == published[int(sender)][1] else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
