"""Connects all ranks of a group through shared memory, or tells every one of them why that is not possible.

Collective, through the group's store. Ranks first compare which kernel and network namespace they are in, then open a socket
to each other, and last pass each other some memory and read what the other has written there: a common host name, or two
containers with one address, prove nothing. Every step ends on all ranks with the same answer, so they decide alike.
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

from ringattn.comm.consistency import ranks_named
from ringattn.comm.shared_memory import Links
from ringattn.comm.shared_memory_link import Link, mapped, shared_memory

CONNECTING = 20.0  # seconds for ranks that have all come to connect to each other
WORD = 16  # bytes of a secret
MOST_PROBLEMS = 32  # that are told


@dataclass
class Meeting:
    """Where ranks of one group tell each other what they found. store: of torch.distributed, for this purpose alone."""

    store: Any
    rank: int
    world: int

    def problems(self, step: str, mine: str) -> str:
        """The problems of all ranks in `step`, the same text on each, empty if there is none; waits for all of them.

        Costs each rank a handful of requests, however many ranks there are.
        """
        if mine:
            self.store.set(f"{step}/problem/{self.store.add(f'{step}/problems', 1)}", f"{self.rank}:{mine}")
        if self.store.add(f"{step}/ranks", 1) == self.world:
            count = min(self.store.add(f"{step}/problems", 0), MOST_PROBLEMS)
            self.store.set(f"{step}/answer", self._told([f"{step}/problem/{n + 1}" for n in range(count)]) or "none")
        answer = str(self.store.get(f"{step}/answer").decode())
        return "" if answer == "none" else answer

    def _told(self, keys: list[str]) -> str:
        """Each problem once, with the ranks that have it."""
        ranks: dict[str, list[int]] = {}
        for rank, _, text in sorted(self.store.get(key).decode().partition(":") for key in keys):
            ranks.setdefault(text, []).append(int(rank))
        return "; ".join(f"{ranks_named(sorted(of), self.world)}: {text}" for text, of in ranks.items())

    def compare(self, step: str, what: str, value: str) -> str:
        """Empty on every rank if all have the same `value`; else, in words, which ranks differ from rank 0."""
        if self.rank == 0:
            self.store.set(f"{step}/of rank 0", value)
        first = self.store.get(f"{step}/of rank 0").decode()
        return self.problems(step, "" if value == first else f"{what} is {value}, on rank 0 {first}")


def connect(meeting: Meeting, timeout: float) -> Links | str:
    """Links to all other ranks, on every rank; or on every rank why there are none. timeout: seconds, of later waits."""
    problem = apart(meeting)
    if problem:
        return problem
    links: dict[int, Link] = {}
    mine, opened = "", None
    with ExitStack() as stack:
        try:
            opened = _open(meeting, stack)
        except OSError as error:
            mine = f"no shared memory: {error}"
        problem = meeting.problems("open", mine)  # nobody waits for a rank that cannot be reached
        if problem or opened is None:
            return problem
        door, memory = opened
        try:
            mine = _connect_all(meeting, door, memory, links, time.monotonic() + min(timeout, CONNECTING))
        except OSError as error:
            mine = f"no connection for shared memory: {error}"
    problem = meeting.problems("connected", mine)
    if problem:
        for link in links.values():
            link.close()
        return problem
    return Links(links, timeout)


def apart(meeting: Meeting) -> str:
    """Which ranks are not on the host of rank 0, in words, the same on every rank; empty if all are. Collective."""
    return meeting.compare("place", "this host", _place())


def _place() -> str:
    """The running kernel and the network namespace, within which Unix sockets without a file are known by name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
    except OSError as error:
        return f"{socket.gethostname()}, about which Linux tells nothing ({error})"


def _open(meeting: Meeting, stack: ExitStack) -> tuple[socket.socket, int]:
    """A socket that listens, whose name and this rank's secret the others are told; and memory that holds the secret."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memory files (memfd_create)")
    name, secret = f"ringattn-{secrets.token_hex(WORD)}", secrets.token_bytes(WORD)
    memory = shared_memory(os.sysconf("SC_PAGE_SIZE"))
    stack.callback(os.close, memory)
    mapped(memory)[:WORD] = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
    door = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    door.bind(f"\0{name}")
    door.listen(meeting.world)
    meeting.store.set(f"socket/{meeting.rank}", f"{name} {secret.hex()}")
    return door, memory


def _connect_all(meeting: Meeting, door: socket.socket, memory: int, links: dict[int, Link], deadline: float) -> str:
    """Fill `links`; the first thing that is wrong, in words. Raises `OSError` where the system refuses."""
    rank, world = meeting.rank, meeting.world
    places = {peer: meeting.store.get(f"socket/{peer}").decode().split() for peer in range(world)}
    secret = places[rank][1]

    def greet(peer: int, one: socket.socket) -> None:
        links[peer] = Link(peer, one)
        _limit(one, deadline)
        socket.send_fds(one, [f"{rank} {places[peer][1]}".encode()], [memory])

    for peer in range(rank):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _limit(one, deadline)
        one.connect(f"\0{places[peer][0]}")
        greet(peer, one)
    while len(links) < world - 1:
        _limit(door, deadline)
        one, _ = door.accept()
        caller = _introduced(one, secret, places, deadline)
        if caller is None or caller <= rank or caller in links:
            one.close()  # of a stranger: names of such sockets are no secret, what ranks say is
        else:
            greet(caller, one)
    for peer in range(rank):
        if _introduced(links[peer].socket, secret, places, deadline) != peer:
            return f"rank {peer} has no access to the memory of this rank, or this rank none to its"
    for link in links.values():
        link.socket.setblocking(False)
    return ""


def _limit(one: socket.socket, deadline: float) -> None:
    one.settimeout(max(0.01, deadline - time.monotonic()))


def _introduced(one: socket.socket, secret: str, places: dict[int, list[str]], deadline: float) -> int | None:
    """Which rank speaks, if it knows this rank's secret and has passed on memory that holds its own; else None."""
    _limit(one, deadline)
    data, descriptors, _, _ = socket.recv_fds(one, 256, 1)
    try:
        word, _, told = data.decode(errors="replace").partition(" ")
        if told != secret or not descriptors or not word.isdigit() or int(word) not in places:
            return None
        found = bytes(mapped(descriptors[0])[:WORD].tolist())
        return int(word) if found.hex() == places[int(word)][1] else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
