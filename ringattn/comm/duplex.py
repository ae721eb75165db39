"""Sends and receives between two ranks, so that both directions of a link run at full rate.

gloo joins two ranks with one TCP connection, and in it each direction's acknowledgements wait behind the other's data: on
shaped links a pair that exchanges 1 MB both ways took 0.33 s where one way takes 0.17 s (docs/log.md). A second group over the
same ranks has connections of its own; what goes to a higher rank travels in the first and what goes to a lower one in the
second. NCCL has channels for both directions already and needs none of this.

Every point-to-point transfer of the library is made here. What it does not do: check sizes, dtypes or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

_twins: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()  # a twin ends with its group


def prepare(group: Group) -> None:
    """Make the second connections of a gloo group, once. Collective: every rank of `group` calls it at the same point."""
    if group is None or group in _twins or dist.get_backend(group) != "gloo":
        return
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    ranks = dist.get_process_group_ranks(group)
    _twins[group] = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)


def sending(tensor: Tensor, group: Group, rank: int, peer: int) -> dist.P2POp:
    """`rank` of `group` sends `tensor` to `peer`."""
    return dist.P2POp(dist.isend, tensor, group=_one_way(group, rank, peer), group_peer=peer)


def receiving(tensor: Tensor, group: Group, rank: int, peer: int) -> dist.P2POp:
    """`rank` of `group` receives `tensor` from `peer`."""
    return dist.P2POp(dist.irecv, tensor, group=_one_way(group, peer, rank), group_peer=peer)


def start(ops: Sequence[dist.P2POp]) -> list[list[dist.Work]]:
    """Post `ops`, those of one group together; for each, what to wait for: its handle, or the one for its whole group."""
    started: list[list[dist.Work]] = [[] for _ in ops]
    for group in dict.fromkeys(op.group for op in ops):
        numbers = [n for n, op in enumerate(ops) if op.group is group]
        works = dist.batch_isend_irecv([ops[n] for n in numbers])
        for k, n in enumerate(numbers):
            started[n] = [works[k]] if len(works) == len(numbers) else works
    return started


def finish(ops: Sequence[dist.P2POp]) -> None:
    """Post `ops` and wait for all of them."""
    for works in start(ops):
        for work in works:
            work.wait()


def _one_way(group: Group, src: int, dst: int) -> Group:
    return group if src < dst or group is None else _twins.get(group, group)
