"""Other libraries' attention over sharded sequences, on the same local kernel, behind one shape: see `base`.

Each peer is installed from PyPI (the extra `bench`) and run as it is; where it needs what only a GPU has, its file gives it
the least that lets it run, and says why. Its algorithm and what it sends are its own.
"""

from __future__ import annotations

from peers import deepspeed_ulysses, lucidrains, ring_flash, torch_ring, usp
from peers.base import Attention, Peer, Setting

LIBRARIES = (ring_flash, usp, deepspeed_ulysses, torch_ring, lucidrains)


def peers(setting: Setting) -> list[Peer]:
    """All of them, whether they can run this setting or not."""
    return [peer for library in LIBRARIES for peer in library.peers(setting)]


__all__ = ["LIBRARIES", "Attention", "Peer", "Setting", "peers"]
