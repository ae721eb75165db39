"""Chooses the transport of a group: shared memory where all of its ranks are on one host, else point-to-point messages.

`init` chooses once for the default group, together with all ranks; other groups follow it, each with connections of its own.
Where `init` was not called, or with `transport="p2p"`, nothing but `P2P` is used. Symmetric memory, between GPUs, is taken by
name alone.
"""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from ringattn.comm.p2p import P2P
from ringattn.comm.process_group import described
from ringattn.comm.shared_memory import Links, SharedMemory
from ringattn.comm.shared_memory_setup import Meeting, apart, connect
from ringattn.comm.symmetric_memory import Arena, SymmetricMemory, open_arena, unsupported_reason
from ringattn.errors import LaunchError
from ringattn.faults.watchdog import transferring

AUTOMATIC, PLAIN, SHARED, SYMMETRIC = "automatic", "p2p", "shared_memory", "symmetric_memory"
TRANSPORTS = (PLAIN, SHARED, SYMMETRIC)
DEADLINE = 120.0  # seconds, where no backend has one

_choices: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()  # a choice ends with its group, and so do links
_links: WeakKeyDictionary[dist.ProcessGroup, Links | Arena | None] = WeakKeyDictionary()
_set_ups: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # how many there were: keys in a store are used once


def transport_for(group: dist.ProcessGroup | None) -> P2P:
    """The transport for this process's rank of `group`. Collective when a group comes for the first time.

    Raises:
        LaunchError: shared or symmetric memory was asked for by name and is not possible in this group.
        CommError: a rank did not come.
    """
    if group is None:
        return P2P(None)
    if group not in _links:
        choice = _choice(group)
        _links[group] = None if choice == PLAIN else _set_up(group, choice)
    links = _links[group]
    if isinstance(links, Arena):
        return SymmetricMemory(group, links)
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
    if isinstance(former, Links):
        former.close("another transport was chosen")
    transport_for(group if dist.get_world_size(group) > 1 else None)


def _choice(group: dist.ProcessGroup) -> str:
    world = dist.group.WORLD
    return _choices.get(group) or (_choices.get(world) if world is not None else None) or PLAIN


def _agreed(group: dist.ProcessGroup, choice: str) -> str:
    with transferring("choosing a transport", _said(group)):
        return _meeting(group).compare("choice", "transport", choice)


def moves(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether tensors on `device` can travel in `group` although its backend moves others."""
    return _choice(group) == SYMMETRIC and device.type == "cuda"


def _set_up(group: dist.ProcessGroup, choice: str) -> Links | Arena | None:
    """What joins the ranks of `group`, or None where the choice is automatic and nothing but p2p can."""
    with transferring(f"setting up {choice} transport", _said(group)):
        found = _arena(group) if choice == SYMMETRIC else _shared(group)
    if not isinstance(found, str):
        return found
    if choice == AUTOMATIC:
        return None
    raise LaunchError(f"transport={choice!r} is not possible here: {found}. Leave transport out, or use transport='p2p'")


def _shared(group: dist.ProcessGroup) -> Links | str:
    timeout = _timeout(group, "cpu")
    if timeout is None:  # so it is on all ranks
        return f"it moves tensors on CPUs and the backend of this group, {described(group)}, none"
    return connect(_meeting(group), timeout)


def _arena(group: dist.ProcessGroup) -> Arena | str:
    meeting = _meeting(group)
    problem = meeting.problems("device", unsupported_reason()) or apart(meeting)
    if problem:
        return problem
    mine, found = "", None
    try:
        found = open_arena(group, _timeout(group, "cuda") or _timeout(group, "cpu") or DEADLINE)
    except RuntimeError as error:
        mine = f"torch says: {str(error).strip().splitlines()[0]}"
    problem = meeting.problems("rendezvous", mine)
    return problem if problem or found is None else found


def _timeout(group: dist.ProcessGroup, device: str) -> float | None:
    """Seconds that the backend of `group` for `device` waits; None if there is no such backend."""
    try:
        return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
    except RuntimeError:
        return None


def _said(group: dist.ProcessGroup) -> str:
    return f"rank {dist.get_rank(group)}: the ranks could not agree on a transport; some rank has died, or came to another call"


def _meeting(group: dist.ProcessGroup) -> Meeting:
    number = _set_ups[group] = _set_ups.get(group, 0) + 1
    store = PrefixStore(f"ringattn/transport/{number}", _get_process_group_store(group))
    return Meeting(store, dist.get_rank(group), dist.get_world_size(group))


def _close_in_child() -> None:
    """A forked child has copies of the sockets: with them open, peers would not notice the end of its parent."""
    for links in list(_links.values()):
        if isinstance(links, Links):
            links.close()


os.register_at_fork(after_in_child=_close_in_child)
