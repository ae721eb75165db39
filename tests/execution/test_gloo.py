"""The same engine over real processes and gloo: equal to dense attention, and to the bit to the simulated transport."""

import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from cases import EXACT, HEADS, LAYOUTS, MASKS, Case, example, product_of_everything, simulate, worst
from spawn import RankFailure, run_ranks

from ringattn import attention, make_plan, positions, shard, unshard
from ringattn.comm.p2p import P2P
from ringattn.comm.simulated import Simulated
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options

LENGTH = 19
# All others are transforms of these; the simulated transport tests that they are right.
ON_GLOO = (
    "ring",
    "ring_direct",
    "bidirectional_ring",
    "token_ring",
    "token_ring_direct",
    "mesh",
    "token_ring_halves_in_turn",
    "ulysses_in_stages",
    "ulysses_outside",
)
cached_example = lru_cache(maxsize=None)(lambda heads, mask: example(HEADS[heads], LENGTH, MASKS[mask]))


def every_other(world: int) -> Iterator[Case]:
    """Half of all: each schedule with each mask and each heads, in one of the layouts or in two of them."""
    for case in product_of_everything(range(world, world + 1), LENGTH, ON_GLOO):
        of = (ON_GLOO.index(case.schedule), LAYOUTS.index(case.layout), [*MASKS].index(case.mask), [*HEADS].index(case.heads))
        if sum(of) % 2 == 0:
            yield case


def all_cases(rank: int, world: int, layout: str) -> float:
    """The worst error of this rank over all schedules, masks and heads, through the public function."""
    errors = []
    for case in (c for c in every_other(world) if c.layout == layout):
        plan, e = case.plan(), cached_example(case.heads, case.mask)
        q, k, v = (shard(x.detach(), plan).requires_grad_() for x in (e.q, e.k, e.v))
        out, lse = attention(q, k, v, plan, return_lse=True)
        grads = torch.autograd.grad(out, (q, k, v), shard(e.dout, plan))
        expected = (*(shard(x, plan) for x in (e.out.detach(), *e.grads)), shard(e.lse, plan, dim=2))
        errors.append(worst((out.detach(), *grads, lse), expected))
    return max(errors)


# Beyond five ranks one layout each: the simulated transport has them all, and only the processes differ here.
MANY = [("zigzag", 6), ("contiguous", 7), ("striped", 8)]


@pytest.mark.slow
@pytest.mark.case(13, 17)
@pytest.mark.parametrize(("layout", "world"), [*product(LAYOUTS, range(1, 6)), *MANY])
def test_every_case_equals_dense_attention(layout: str, world: int) -> None:
    assert max(run_ranks(world, all_cases, world, layout)) < EXACT


def real_and_simulated(rank: int, world: int) -> None:
    """Same bits, same bytes on every link, forward and backward, in fp32 and bf16."""
    for schedule in ("ring", "bidirectional_ring", "token_ring", "token_ring_direct", "ulysses_outside"):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(schedule, "zigzag", "causal", "9over3", world, 41)
            plan = case.plan(dtype=dtype)
            e = example(HEADS["9over3"], 41, MASKS["causal"])
            full = [x.detach().to(dtype) for x in (e.q, e.k, e.v, e.dout)]
            q, k, v, dout = (shard(x, plan).requires_grad_() for x in full)
            real, simulated = P2P(dist.group.WORLD), Simulated(world)
            ((out, _),) = attend([Inputs(q, k, v)], plan, Options(plan.head_dim**-0.5), real)
            own = (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))
            expected = simulate(plan, *full, transport=simulated)
            for a, b in zip(own, (expected[0], *expected[2:]), strict=True):
                assert torch.equal(a, shard(b, plan)), case
            sent = {link: n for link, n in simulated.bytes_sent.items() if link[0] == rank}
            assert dict(real.bytes_sent) == sent, case


@pytest.mark.parametrize("world", [2, 3])
def test_both_transports_give_the_same_bits_and_bytes(world: int) -> None:
    run_ranks(world, real_and_simulated, world)


def there_and_back(rank: int, world: int) -> None:
    for length in (1, 2, 17):
        plan = make_plan(length, world=world, heads=2, head_dim=8, schedule="ring", layout="zigzag")
        x = torch.arange(2.0 * length * 3).reshape(2, length, 3).requires_grad_()
        gathered = unshard(shard(x, plan), plan)
        assert torch.equal(gathered, x)
        gathered.sum().backward()
        assert torch.equal(x.grad, shard_mask(plan, x) * world)


def shard_mask(plan, x: torch.Tensor) -> torch.Tensor:
    """1 where this rank holds the row: there the gradient of a sum over the whole sequence on all ranks is `world`."""
    return torch.zeros_like(x).index_fill_(1, positions(plan), 1.0)


def test_shard_and_unshard_are_inverse() -> None:
    run_ranks(3, there_and_back, 3)


def hang(rank: int) -> None:
    if rank == 0:
        dist.recv(torch.zeros(1), 1)
    else:
        torch.nn.functional.relu(torch.zeros(1))
        stay_away()


def stay_away() -> None:
    time.sleep(60)


@pytest.mark.slow
def test_a_hang_fails_in_time_and_shows_every_stack() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 0: did not return.*in hang.*rank 1: did not return.*in stay_away"):
        run_ranks(2, hang, timeout=6)
