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

from torch.distributed.distributed_c10d import Store

from ringattn.errors import LaunchError

INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of linux: the IPv4 address of an interface


def address() -> str:
    """IPv4 address that gloo will tell the others. Raises `LaunchError` if GLOO_SOCKET_IFNAME names no interface with one."""
    name = os.environ.get(INTERFACE, "").split(",")[0]
    if not name:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return "127.0.0.1"  # so does gloo
    there = [known for _, known in socket.if_nameindex()]
    if name not in there:
        raise LaunchError(f"{INTERFACE}={name}: this host ({socket.gethostname()}) has {', '.join(there)}; name one of these")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            found = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise LaunchError(f"{INTERFACE}={name}: this interface has no IPv4 address; name one that has") from error
    return socket.inet_ntoa(found[20:24])


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
        failed = {}
        for peer in peers:
            there, _, port = store.get(f"listens/{peer}").decode().rpartition(":")
            try:
                socket.create_connection((there, int(port)), timeout=timeout).close()
            except OSError as error:
                failed[peer] = f"{there}: {error}"
        store.set(f"tried/{rank}", "")
        store.wait([f"tried/{peer}" for peer in peers])
    return failed
