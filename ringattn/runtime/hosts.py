"""Determines this host's address and which ranks cannot connect to each other, by sockets and before there is a process group.

gloo uses the address of the interface in GLOO_SOCKET_IFNAME, else what the hostname resolves to, and reports neither when peers
cannot connect. A hostname that resolves to 127.0.1.1, as in some distributions, is the usual cause.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed.distributed_c10d import Store

from ringattn.errors import LaunchError

NEAR = 16  # ranks tried on each side
INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of linux: the IPv4 address of an interface


def address() -> str:
    """The IPv4 address that gloo announces to other ranks. Raises `LaunchError` if GLOO_SOCKET_IFNAME names none with one."""
    name = os.environ.get(INTERFACE, "").split(",")[0]
    if not name:
        return _address_of_hostname()
    names = [known for _, known in socket.if_nameindex()]
    if name not in names:
        raise LaunchError(f"{INTERFACE}={name}: this host ({socket.gethostname()}) has {', '.join(names)}; name one of these")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            request = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise LaunchError(f"{INTERFACE}={name}: this interface has no IPv4 address; name one that has") from error
    return socket.inet_ntoa(request[20:24])


def _address_of_hostname() -> str:
    """The address of the hostname, or the loopback address where that is not an address of this host; as gloo chooses."""
    try:
        resolved = socket.gethostbyname(socket.gethostname())
        with socket.socket() as sock:
            sock.bind((resolved, 0))
    except OSError:
        return "127.0.0.1"
    return resolved


def unreachable(store: Store, rank: int, peers: Iterable[int], timeout: float) -> dict[int, str]:
    """Maps the `peers` that this rank cannot connect to, to address and reason; every rank calls it.

    Each rank listens on its own address, announces it through the store, tries its peers, and stays until all are done.
    """
    own = address()
    peers = list(peers)
    with socket.socket() as listener:
        listener.bind((own, 0))
        listener.listen(len(peers) + 1)
        store.set(f"listens/{rank}", f"{own}:{listener.getsockname()[1]}")
        endpoints = [store.get(f"listens/{peer}").decode() for peer in peers]
        with ThreadPoolExecutor(len(peers) or 1) as pool:  # where packets are dropped, each waits for the whole timeout
            reasons = dict(zip(peers, pool.map(lambda endpoint: _refusal(endpoint, timeout), endpoints), strict=True))
        store.set(f"tried/{rank}", "")
        store.wait([f"tried/{peer}" for peer in peers])
    return {peer: why for peer, why in reasons.items() if why}


def _refusal(endpoint: str, timeout: float) -> str:
    """The reason why no connection can be opened to host:port; empty if one can."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout).close()
    except OSError as error:
        return f"{host}: {error}"
    return ""


def unreachable_pairs_of(store: Any, rank: int, world: int, timeout: float) -> str:
    """Lists pairs of near ranks of which neither can connect to the other, as text, the same on every rank; empty if none.

    One direction is enough for gloo. Every rank calls it.
    """
    near = sorted({(rank + n) % world for n in range(-NEAR, NEAR + 1)} - {rank})
    failed = unreachable(store, rank, near, timeout)
    store.set(f"failed/{rank}", " ".join(map(str, failed)))
    for peer in (peer for peer in failed if peer > rank and str(rank) in store.get(f"failed/{peer}").decode().split()):
        store.append("apart", f"; rank {rank} and rank {peer} cannot connect to each other ({failed[peer]})")
    store.set(f"done/{rank}", "")
    store.wait([f"done/{peer}" for peer in range(world)])
    return store.get("apart").decode().removeprefix("; ") if store.check(["apart"]) else ""
