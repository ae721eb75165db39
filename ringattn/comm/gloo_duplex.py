"""Sends and receives between two ranks, so that both directions of a link run at full rate.

gloo joins two ranks with one TCP connection, and in it each direction's acknowledgements wait behind the other's data: on
shaped links a pair that exchanges 1 MB both ways took 0.33 s where one way takes 0.17 s (docs/log.md). A second group over the
same ranks has connections of its own; what goes to a higher rank travels in the first and what goes to a lower one in the
second. NCCL has channels for both directions already and needs none of this: there, what is posted together is one batch with
one handle. A group may have both backends; the tensor decides which of them moves it.

Every point-to-point transfer of the library is made here. What it does not do: check sizes, dtypes or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_process_group_store

from ringattn.comm.process_group import CPU, backends, is_asynchronous, timeout_of, waits_on_stream
from ringattn.faults.watchdog import follow, transferring

Group = dist.ProcessGroup | None

_connected: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()  # device types; ends with its group
_twins: WeakKeyDictionary[dist.ProcessGroup, ProcessGroupGloo] = WeakKeyDictionary()  # a twin ends with its group


class Transfer(NamedTuple):
    """`tensor` goes from rank `src` of `group` to rank `dst`; `rank` is the one that is here, either of the two."""

    tensor: Tensor
    group: Group
    rank: int
    src: int
    dst: int
    tag: int = 0  # gloo never joins a send and a receive whose tags differ; NCCL has none


def sending(tensor: Tensor, group: Group, rank: int, peer: int, tag: int = 0) -> Transfer:
    """`rank` of `group` sends `tensor` to `peer`."""
    return Transfer(tensor, group, rank, rank, peer, tag)


def receiving(tensor: Tensor, group: Group, rank: int, peer: int, tag: int = 0) -> Transfer:
    """`rank` of `group` receives into `tensor` from `peer`."""
    return Transfer(tensor, group, rank, peer, rank, tag)


def prepare(group: Group) -> None:
    """Make the second connections of a group that has gloo, once. Collective: all its ranks call it at the same point."""
    if group is None or group in _twins or backends(group).get("cpu") != "gloo":
        return
    # Not by new_group: it names groups by how many a process has been in, which differs between ranks of subgroups.
    store = PrefixStore("ringattn/duplex", _get_process_group_store(group))
    timeout = timedelta(seconds=timeout_of(group, CPU))
    _twins[group] = ProcessGroupGloo(store, dist.get_rank(group), dist.get_world_size(group), timeout)


def connect(group: Group, device: torch.device) -> None:
    """Let all ranks of `group` meet once in the backend that moves tensors of `device`. Collective, like `prepare`.

    NCCL makes its communicator when it is first used, and then all ranks must come. The first batch of a schedule may leave a
    rank out, or reach it only after it has waited for others.
    """
    if group is None or not is_asynchronous(device) or device.type in _connected.setdefault(group, set()):
        return
    with transferring("connecting GPUs", f"rank {dist.get_rank(group)}: the GPUs of the group could not be connected"):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    _connected[group].add(device.type)


def start(transfers: Sequence[Transfer]) -> list[list[dist.Work]]:
    """Post `transfers`, of one group and device, together; for each, what to wait for: its own handle, or the one for all."""
    tensor, group, *_ = transfers[0]
    group = dist.group.WORLD if group is None else group
    assert group is not None
    twin = _twins.get(group) if tensor.is_cpu else None
    if twin is not None:
        works = [_one_way(transfer, group if transfer.src < transfer.dst else twin) for transfer in transfers]
    elif tensor.is_cpu:
        works = [_one_way(transfer, group) for transfer in transfers]
    else:
        works = _as_batch(transfers, group, tensor.device)
    if waits_on_stream(tensor):
        follow(works, group, tensor.device)
    return [[work] for work in works] if len(works) == len(transfers) else [works] * len(transfers)


def finish(transfers: Sequence[Transfer]) -> None:
    """Post `transfers` and wait for all of them."""
    for works in start(transfers):
        for work in works:
            work.wait()


def _one_way(transfer: Transfer, way: Any) -> dist.Work:
    tensor, _, rank, src, dst, tag = transfer
    work: dist.Work = way.send([tensor], dst, tag) if rank == src else way.recv([tensor], src, tag)
    return work


def _as_batch(transfers: Sequence[Transfer], group: Any, device: torch.device) -> list[dist.Work]:
    """Transfers that the backend starts together; NCCL gives one handle for all of them.

    As `dist.batch_isend_irecv`, less its checks of arguments, which take the host longer than all else that is done here.
    """
    if type(group) is not dist.ProcessGroup or not group._get_backend(device).supports_coalescing:
        return [_one_way(transfer, group) for transfer in transfers]
    group._start_coalescing(device)
    for transfer in transfers:
        _one_way(transfer, group)
    return [group._end_coalescing(device)]
