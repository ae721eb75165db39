"""Chooses the transport of a group: shared memory where all of its ranks are on one host, else point-to-point messages.

`init` chooses once for the default group, together with all ranks; other groups follow it, each with connections of its own.
Where `init` was not called, or with `transport="p2p"`, nothing but `P2P` is used.
"""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from ringattn.comm.board import transferring
from ringattn.comm.p2p import P2P
from ringattn.comm.shared_memory import Links, SharedMemory
from ringattn.comm.shared_memory_setup import Meeting, connect
from ringattn.errors import LaunchError

AUTOMATIC, PLAIN, SHARED = "automatic", "p2p", "shared_memory"
TRANSPORTS = (PLAIN, SHARED)

_choices: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()  # a choice ends with its group, and so do links
_links: WeakKeyDictionary[dist.ProcessGroup, Links | None] = WeakKeyDictionary()
_set_ups: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # how many there were: keys in a store are used once


def transport_for(group: dist.ProcessGroup | None) -> P2P:
    """The transport for this process's rank of `group`. Collective when a group comes for the first time.

    Raises:
        LaunchError: shared memory was asked for by name and is not possible in this group.
        CommError: a rank did not come.
    """
    if group is None:
        return P2P(None)
    if group not in _links:
        world = dist.group.WORLD
        choice = _choices.get(group) or (_choices.get(world) if world is not None else None) or PLAIN
        _links[group] = None if choice == PLAIN else _set_up(group, choice)
    links = _links[group]
    return P2P(group) if links is None else SharedMemory(group, links)


def choose(group: dist.ProcessGroup, transport: str | None) -> None:
    """From now on `group` uses `transport`, one of `TRANSPORTS` or None for the best one that is possible. Collective.

    Chosen for the default group it holds for all groups that make no choice of their own and have not been used yet.

    Raises:
        LaunchError: ranks ask for different transports, or shared memory was asked for by name and is not possible.
        CommError: a rank did not come.
    """
    choice = AUTOMATIC if transport is None else transport
    if dist.get_world_size(group) > 1:
        different = _agreed(group, choice)
        if different:
            raise LaunchError(f"ranks disagree on transport: {different}. Give all ranks the same one")
    _choices[group] = choice
    former = _links.pop(group, None)
    if former is not None:
        former.close("another transport was chosen")
    transport_for(group if dist.get_world_size(group) > 1 else None)


def _agreed(group: dist.ProcessGroup, choice: str) -> str:
    with transferring("choosing a transport", _said(group)):
        return _meeting(group).compare("choice", "transport", choice)


def _set_up(group: dist.ProcessGroup, choice: str) -> Links | None:
    """Links between all ranks of `group`, or None where the choice is automatic and there can be none."""
    try:
        timeout = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    except RuntimeError as error:  # the group moves nothing on CPUs, on any rank
        if choice == AUTOMATIC:
            return None
        raise LaunchError(
            f"transport={choice!r} moves tensors on CPUs and the backend of this group, {dist.get_backend(group)}, none; "
            "use init(backend='gloo'), or leave transport out"
        ) from error
    with transferring("connecting through shared memory", _said(group)):
        found = connect(_meeting(group), timeout)
    if isinstance(found, Links):
        return found
    if choice == AUTOMATIC:
        return None
    raise LaunchError(f"transport={choice!r} is not possible here: {found}. Leave transport out, or use transport='p2p'")


def _said(group: dist.ProcessGroup) -> str:
    return f"rank {dist.get_rank(group)}: the ranks could not agree on a transport; some rank has died, or came to another call"


def _meeting(group: dist.ProcessGroup) -> Meeting:
    number = _set_ups[group] = _set_ups.get(group, 0) + 1
    store = PrefixStore(f"ringattn/transport/{number}", _get_process_group_store(group))
    return Meeting(store, dist.get_rank(group), dist.get_world_size(group))


def _close_in_child() -> None:
    """A forked child has copies of the sockets: with them open, peers would not notice the end of its parent."""
    for links in list(_links.values()):
        if links is not None:
            links.close()


os.register_at_fork(after_in_child=_close_in_child)
