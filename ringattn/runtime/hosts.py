"""Under which address this host is reached by the others, and who can reach whom: asked of sockets, before any process group.

gloo takes the address of the interface in GLOO_SOCKET_IFNAME, else what the host's name resolves to, and says nothing of it
when peers cannot connect. A host whose name resolves to 127.0.1.1, as some distributions have it, is the usual trouble.
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

NEAR = 16  # ranks to each side that are tried: all, on a few hosts
INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of linux: the IPv4 address of an interface


def address() -> str:
    """IPv4 address that gloo will tell the others. Raises `LaunchError` if GLOO_SOCKET_IFNAME names no interface with one."""
    name = os.environ.get(INTERFACE, "").split(",")[0]
    if not name:
        return _of_name()
    there = [known for _, known in socket.if_nameindex()]
    if name not in there:
        raise LaunchError(f"{INTERFACE}={name}: this host ({socket.gethostname()}) has {', '.join(there)}; name one of these")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            found = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise LaunchError(f"{INTERFACE}={name}: this interface has no IPv4 address; name one that has") from error
    return socket.inet_ntoa(found[20:24])


def _of_name() -> str:
    """What this host's name stands for; the loopback address where that is none of this host's, as gloo has it."""
    try:
        found = socket.gethostbyname(socket.gethostname())
        with socket.socket() as trying:
            trying.bind((found, 0))
    except OSError:
        return "127.0.0.1"
    return found


def unreachable(store: Store, rank: int, peers: Iterable[int], timeout: float) -> dict[int, str]:
    """Those of `peers` to which this rank can open no connection, each with its address and why; every rank calls it.

    Each rank listens on its own address, tells it through the store, tries all its peers, and stays until all are done.
    """
    own = address()
    peers = list(peers)
    with socket.socket() as listening:
        listening.bind((own, 0))
        listening.listen(len(peers) + 1)
        store.set(f"listens/{rank}", f"{own}:{listening.getsockname()[1]}")
        places = [store.get(f"listens/{peer}").decode() for peer in peers]
        with ThreadPoolExecutor(len(peers) or 1) as together:  # where packets are dropped each takes all of its time
            found = dict(zip(peers, together.map(lambda place: _refusal(place, timeout), places), strict=True))
        store.set(f"tried/{rank}", "")
        store.wait([f"tried/{peer}" for peer in peers])
    return {peer: why for peer, why in found.items() if why}


def _refusal(place: str, timeout: float) -> str:
    """Why no connection can be opened to host:port; empty if one can."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout).close()
    except OSError as error:
        return f"{host}: {error}"
    return ""


def cut_off(store: Any, rank: int, world: int, timeout: float) -> str:
    """Pairs of near ranks of which neither can connect to the other, in words, the same on every rank; empty if there is none.
    One direction is enough for gloo. Every rank calls it."""
    near = sorted({(rank + n) % world for n in range(-NEAR, NEAR + 1)} - {rank})
    failed = unreachable(store, rank, near, timeout)
    store.set(f"failed/{rank}", " ".join(map(str, failed)))
    for peer in (peer for peer in failed if peer > rank and str(rank) in store.get(f"failed/{peer}").decode().split()):
        store.append("apart", f"; rank {rank} and rank {peer} cannot connect to each other ({failed[peer]})")
    store.set(f"done/{rank}", "")
    store.wait([f"done/{peer}" for peer in range(world)])
    return store.get("apart").decode().removeprefix("; ") if store.check(["apart"]) else ""
