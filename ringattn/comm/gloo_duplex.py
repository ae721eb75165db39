"""Posts sends and receives so that both directions of a link between two ranks run at full rate.

gloo joins two ranks with one TCP connection, in which each direction's acknowledgements wait behind the other direction's data:
on shaped links a pair that exchanges 1 MB both ways took 0.33 s where one way takes 0.17 s (docs/log.md). A second group over
the same ranks has its own connections; messages to a higher rank travel in the first and messages to a lower rank in the
second. NCCL has channels for both directions and does not need this: transfers that are posted together are one batch with one
handle. A group may have both backends; the tensor decides which of them moves it.

Every point-to-point transfer of the library is posted here. Sizes, dtypes and order are not checked here.
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
from ringattn.faults.watchdog import comm_errors, follow

Group = dist.ProcessGroup | None

_connected: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()  # device types; ends with its group
_twins: WeakKeyDictionary[dist.ProcessGroup, ProcessGroupGloo] = WeakKeyDictionary()  # a twin ends with its group


class Transfer(NamedTuple):
    """`tensor` goes from rank `src` of `group` to rank `dst`; `rank` is this process, one of the two."""

    tensor: Tensor
    group: Group
    rank: int
    src: int
    dst: int
    tag: int = 0  # gloo never matches a send with a receive of another tag; NCCL ignores tags


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
    # Not with new_group: it numbers groups by how many this process has joined, which differs between ranks of subgroups.
    store = PrefixStore("ringattn/duplex", _get_process_group_store(group))
    timeout = timedelta(seconds=timeout_of(group, CPU))
    _twins[group] = ProcessGroupGloo(store, dist.get_rank(group), dist.get_world_size(group), timeout)


def connect(group: Group, device: torch.device) -> None:
    """Connect all ranks of `group` once in the backend that moves tensors of `device`. Collective, like `prepare`.

    NCCL creates its communicator at its first use, in which all ranks must take part. The first batch of a schedule may leave
    a rank out, or reach it only after it has waited for others.
    """
    if group is None or not is_asynchronous(device) or device.type in _connected.setdefault(group, set()):
        return
    with comm_errors("connecting GPUs", f"rank {dist.get_rank(group)}: the GPUs of the group could not be connected"):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    _connected[group].add(device.type)


def start(transfers: Sequence[Transfer]) -> list[list[dist.Work]]:
    """Post `transfers` of one group and device together; returns for each the handles to wait for: its own, or that of all."""
    tensor, group, *_ = transfers[0]
    group = dist.group.WORLD if group is None else group
    assert group is not None
    twin = _twins.get(group) if tensor.is_cpu else None
    if twin is not None:
        works = [_post(transfer, group if transfer.src < transfer.dst else twin) for transfer in transfers]
    elif tensor.is_cpu:
        works = [_post(transfer, group) for transfer in transfers]
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


def _post(transfer: Transfer, connection: Any) -> dist.Work:
    tensor, _, rank, src, dst, tag = transfer
    work: dist.Work = connection.send([tensor], dst, tag) if rank == src else connection.recv([tensor], src, tag)
    return work


def _as_batch(transfers: Sequence[Transfer], group: Any, device: torch.device) -> list[dist.Work]:
    """Post transfers that the backend starts together; NCCL returns one handle for all of them.

    Like `dist.batch_isend_irecv` without its checks of arguments, which cost the host more time than everything else here.
    """
    if type(group) is not dist.ProcessGroup or not group._get_backend(device).supports_coalescing:
        return [_post(transfer, group) for transfer in transfers]
    group._start_coalescing(device)
    for transfer in transfers:
        _post(transfer, group)
    return [group._end_coalescing(device)]
