"""Both directions of a gloo link have separate connections, whatever groups a process is in."""

import torch
import torch.distributed as dist
from spawn import run_ranks

import ringattn
from ringattn.comm import gloo_duplex as duplex


def _in_different_numbers_of_groups(rank: int) -> tuple[bool, float]:
    dist.new_group([0])  # rank 0 is in one group more
    pair = dist.new_group([0, 1])
    if rank == 2:
        return False, 0.0
    plan = ringattn.make_plan(8, world=2, heads=2, head_dim=4)
    q = torch.ones(1, plan.rows(rank), 2, 4)
    return True, ringattn.attention(q, q, q, plan, group=pair).sum().item() if pair not in duplex._twins else -1.0


def test_ranks_of_a_group_may_be_in_others() -> None:
    assert run_ranks(3, _in_different_numbers_of_groups) == [(True, 32.0), (True, 32.0), (False, 0.0)]


def _both_ways(rank: int) -> bool:
    group = dist.group.WORLD
    duplex.prepare(group)
    outgoing, incoming = torch.full((3,), float(rank)), torch.zeros(3)
    duplex.finish([duplex.sending(outgoing, group, rank, 1 - rank), duplex.receiving(incoming, group, rank, 1 - rank)])
    return bool((incoming == 1 - rank).all()) and group in duplex._twins


def test_each_direction_arrives() -> None:
    assert run_ranks(2, _both_ways) == [True, True]
