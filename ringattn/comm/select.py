"""Chooses the transport of a group: shared memory where all of its ranks are on one host, else point-to-point messages.

`TRANSPORTS` lists them; `register` adds one, which is used only when named.

`init` chooses once for the default group, together with all ranks; other groups follow it, each with its own connections. Where
`init` was not called, or with `transport="p2p"`, only `P2P` is used. Symmetric memory, between GPUs, is used only when named.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from ringattn._validation import Registry, definition_of, short_repr
from ringattn.comm.p2p import P2P
from ringattn.comm.process_group import describe_backends
from ringattn.comm.shared_memory import Links, SharedMemory
from ringattn.comm.shared_memory_setup import Rendezvous, connect, host_mismatch
from ringattn.comm.symmetric_memory import Arena, SymmetricMemory, open_arena, unsupported_reason
from ringattn.comm.transport import Transport
from ringattn.errors import InputError, LaunchError
from ringattn.faults.watchdog import comm_errors

AUTOMATIC, PLAIN, SHARED, SYMMETRIC = "automatic", "p2p", "shared_memory", "symmetric_memory"
DEADLINE = 120.0  # seconds, where no backend has a timeout


class TransportInfo(NamedTuple):
    """A transport with a name. `make` builds it, where it was registered."""

    summary: str
    make: Callable[[dist.ProcessGroup], Transport] | None = None


TRANSPORTS: Registry[TransportInfo] = Registry(
    "transport",
    {
        PLAIN: TransportInfo("messages over the group's backend, gloo or NCCL"),
        SHARED: TransportInfo("memory that ranks of one host share, for tensors on CPUs"),
        SYMMETRIC: TransportInfo("memory that GPUs of one host share"),
    },
    reserved=(AUTOMATIC,),
)

_choices: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()  # a choice ends with its group, and so do links
_links: WeakKeyDictionary[dist.ProcessGroup, Links | Arena | Transport | None] = WeakKeyDictionary()
_set_ups: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # number of set-ups: each uses new keys in the store


def register(name: str, make: Callable[[dist.ProcessGroup], Transport]) -> None:
    """Register a transport for `init(transport=name)` and `choose(group, name)`. Call it on every rank.

    Args:
        name: letters, digits, _ and -.
        make: a class or function of a process group. It is called once for each group, on all of its ranks together, and its
            result serves every call of that group: it may keep connections, and must keep calls apart.

    Ranks compare where `make` is defined before they use it.

    Raises:
        InputError: the name is taken or is not a name; `make` cannot be called.
    """
    if not callable(make):
        raise InputError(f"make={short_repr(make)}; give a class or function of a process group that returns a Transport")
    summary = (make.__doc__ or "").strip().partition("\n")[0]
    TRANSPORTS.register(name, TransportInfo(summary, make))


def unregister(name: str) -> None:
    """Remove a registered transport; groups that use it go on. Raises `InputError` if there is none of this name."""
    TRANSPORTS.unregister(name)


def transport_for(group: dist.ProcessGroup | None) -> Transport:
    """The transport for this process's rank of `group`. Collective in the first call with a group.

    Raises:
        LaunchError: shared or symmetric memory was requested by name and is not possible in this group.
        CommError: a rank did not take part.
    """
    if group is None:
        return P2P(None)
    if group not in _links:
        choice = _choice(group)
        _links[group] = None if choice == PLAIN else _set_up(group, choice)
    links = _links[group]
    if links is None:
        return P2P(group)
    if isinstance(links, Arena):
        return SymmetricMemory(group, links)
    return SharedMemory(group, links) if isinstance(links, Links) else links


def choose(group: dist.ProcessGroup, transport: str | None) -> None:
    """Set the transport of `group`: one of `TRANSPORTS`, or None for the best one that is possible. Collective.

    The choice of the default group holds for all groups that have no choice of their own and have not been used yet.

    Raises:
        LaunchError: ranks request different transports, there is none of this name, or shared memory was requested by name and
            is not possible.
        CommError: a rank did not take part.
    """
    choice = AUTOMATIC if transport is None else transport
    if dist.get_world_size(group) > 1:
        make = TRANSPORTS[choice].make if choice in TRANSPORTS else None
        different = _disagreement(group, choice if make is None else f"{choice} ({definition_of(make)})")
        if different:
            raise LaunchError(f"ranks disagree on transport: {different}. Give all ranks the same one")
    _choices[group] = choice
    previous = _links.pop(group, None)
    if isinstance(previous, Links):
        previous.close("another transport was chosen")
    transport_for(group if dist.get_world_size(group) > 1 else None)


def _choice(group: dist.ProcessGroup) -> str:
    world = dist.group.WORLD
    return _choices.get(group) or (_choices.get(world) if world is not None else None) or PLAIN


def _disagreement(group: dist.ProcessGroup, choice: str) -> str:
    with comm_errors("choosing a transport", _failure_message(group)):
        return _new_rendezvous(group).compare("choice", "transport", choice)


def transport_supports(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the transport of `group` moves tensors on `device` although its backend does not."""
    return _choice(group) == SYMMETRIC and device.type == "cuda"


def _set_up(group: dist.ProcessGroup, choice: str) -> Links | Arena | Transport | None:
    """Connect the ranks of `group`; None where the choice is automatic and only p2p is possible."""
    if choice not in (AUTOMATIC, SHARED, SYMMETRIC):
        return _registered(group, choice)
    with comm_errors(f"setting up {choice} transport", _failure_message(group)):
        links = _arena(group) if choice == SYMMETRIC else _shared(group)
    if not isinstance(links, str):
        return links
    if choice == AUTOMATIC:
        return None
    raise LaunchError(f"transport={choice!r} is not possible here: {links}. Leave transport out, or use transport='p2p'")


def _registered(group: dist.ProcessGroup, choice: str) -> Transport:
    make = TRANSPORTS[choice].make if choice in TRANSPORTS else None
    if make is None:
        raise LaunchError(f"transport={choice!r}; choose one of {', '.join(TRANSPORTS)}, or register it before it is used")
    return make(group)


def _shared(group: dist.ProcessGroup) -> Links | str:
    timeout = _timeout(group, "cpu")
    if timeout is None:  # so it is on all ranks
        return f"it moves CPU tensors and the backend of this group, {describe_backends(group)}, does not"
    return connect(_new_rendezvous(group), timeout)


def _arena(group: dist.ProcessGroup) -> Arena | str:
    rendezvous = _new_rendezvous(group)
    problem = rendezvous.problems("device", unsupported_reason()) or host_mismatch(rendezvous)
    if problem:
        return problem
    own_problem, arena = "", None
    try:
        arena = open_arena(group, _timeout(group, "cuda") or _timeout(group, "cpu") or DEADLINE)
    except RuntimeError as error:
        own_problem = f"torch says: {str(error).strip().splitlines()[0]}"
    problem = rendezvous.problems("rendezvous", own_problem)
    return problem if problem or arena is None else arena


def _timeout(group: dist.ProcessGroup, device: str) -> float | None:
    """Seconds that the backend of `group` for `device` waits; None if there is no such backend."""
    try:
        return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
    except RuntimeError:
        return None


def _failure_message(group: dist.ProcessGroup) -> str:
    return f"rank {dist.get_rank(group)}: the ranks could not agree on a transport; a rank has died or makes another call"


def _new_rendezvous(group: dist.ProcessGroup) -> Rendezvous:
    number = _set_ups[group] = _set_ups.get(group, 0) + 1
    store = PrefixStore(f"ringattn/transport/{number}", _get_process_group_store(group))
    return Rendezvous(store, dist.get_rank(group), dist.get_world_size(group))


def _close_in_child() -> None:
    """Close the sockets that a forked child has inherited; else peers would not notice the end of its parent."""
    for links in list(_links.values()):
        if isinstance(links, Links):
            links.close()


os.register_at_fork(after_in_child=_close_in_child)
