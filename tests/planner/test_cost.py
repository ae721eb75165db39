"""Tests the cost of a plan: bytes exactly as the transport counts them and as closed forms give, and times computed by hand."""

from dataclasses import replace
from typing import Any

import cases
import pytest
import torch

from ringattn import Plan, Topology, causal, full, make_plan
from ringattn.comm.simulated import Simulated
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options
from ringattn.planner.cost import MERGE, compute_seconds, price, traffic, transfer_seconds
from ringattn.planner.topology import PRESETS
from ringattn.schedule import Schedule, ring, token_ring

SCHEDULES = cases.SCHEDULES | {"all_gather": lambda world: "all_gather"}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}
FAST = Topology("fast links", "mesh", flops=1e9, link_latency=0.0, bandwidth=1e15)


def counted(plan: Plan, *, batch: int = 1, bias_heads: int = 0) -> list[dict[tuple[int, int], int]]:
    """Bytes per link of forward and of backward, as the simulated transport counts them."""
    dtype = getattr(torch, plan.dtype)
    inputs, transport = [], Simulated(plan.world)
    for rank in range(plan.world):
        rows = plan.rows(rank)
        q, k, v = (
            torch.randn(batch, rows, h, plan.head_dim, dtype=dtype, requires_grad=True)
            for h in (plan.heads, plan.kv_heads, plan.kv_heads)
        )
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        bias = torch.zeros(batch, bias_heads, rows, dtype=wide, requires_grad=True) if bias_heads else None
        inputs.append(Inputs(q, k, v, bias))
    results = attend(inputs, plan, Options(0.5), transport)
    forward = dict(+transport.bytes_sent)
    torch.autograd.backward([out for out, _ in results], [torch.ones_like(out) for out, _ in results])
    return [forward, {link: n - forward.get(link, 0) for link, n in transport.bytes_sent.items() if n > forward.get(link, 0)}]


def predicted(plan: Plan, **options: Any) -> list[dict[tuple[int, int], int]]:
    return [traffic(plan, backward=backward, **options) for backward in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_are_those_that_travel(name: str, world: int) -> None:
    for (heads, kv_heads), mask, layout in zip(
        HEADS.values(), (causal(), full(), causal()), ("zigzag", "striped", "contiguous"), strict=True
    ):
        for dtype in ("float32", "bfloat16"):
            plan = make_plan(
                5 * world + 3, world=world, heads=heads, kv_heads=kv_heads, head_dim=4, dtype=dtype, mask=mask,
                schedule=SCHEDULES[name](world), layout=layout,
            )  # fmt: skip
            assert predicted(plan) == counted(plan), f"{heads}/{kv_heads} {mask} {dtype}"
            assert world == 1 or all(predicted(plan)), "some bytes must travel"


@pytest.mark.parametrize("mask", [full(), causal()], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_bytes_on_every_kind_of_heads_and_mask(heads: str, mask: Any) -> None:
    for name in SCHEDULES:
        arguments = {"world": 4, "heads": HEADS[heads][0], "kv_heads": HEADS[heads][1], "head_dim": 4, "dtype": "float64"}
        plan = make_plan(19, **arguments, mask=mask, schedule=SCHEDULES[name](4), layout="contiguous")
        assert predicted(plan, batch=3) == counted(plan, batch=3), name


def test_bytes_when_ranks_have_no_rows() -> None:
    for name in SCHEDULES:
        plan = make_plan(3, world=5, heads=4, kv_heads=2, head_dim=4, mask=full(), schedule=SCHEDULES[name](5))
        assert predicted(plan) == counted(plan), name


@pytest.mark.parametrize("bias_heads", [1, 2])
def test_a_bias_travels_with_the_keys(bias_heads: int) -> None:
    for name in ("ring", "token_ring", "mesh"):
        plan = make_plan(
            22, world=4, heads=4, kv_heads=2, head_dim=4, dtype="bfloat16", mask=full(), schedule=SCHEDULES[name](4)
        )
        prediction = predicted(plan, bias_heads=bias_heads)
        assert prediction == counted(plan, bias_heads=bias_heads), name
        assert (prediction == predicted(plan)) == (name == "token_ring"), "nothing of KV moves in TokenRing"


@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_the_closed_forms_of_ring_and_token_ring(kv_heads: int, world: int) -> None:
    """Written out from the algorithms, and equal to what the transport counts, on every link, forward and backward."""
    rows, heads, dim, batch = 7, 6, 8, 3
    q, kv, stat = batch * rows * heads * dim * 2, batch * rows * kv_heads * 2 * dim * 2, batch * rows * heads * 4
    next_ranks = {(r, (r + 1) % world) for r in range(world)} if world > 1 else set()
    pairs = {(a, b) for a in range(world) for b in range(world) if a != b}
    # Ring: k and v make world - 1 hops; in backward dk and dv do too, in fp32. With two ranks that is one hop straight to the
    # owner, in bf16.
    wide = 1 if world == 2 else 2
    ring_bytes = [{link: (world - 1) * size for link in next_ranks} for size in (kv, kv + wide * kv)]
    # TokenRing: what goes out hops world - 1 times; results go to the owner from each rank. In forward q, then out
    # and lse; in backward q, dout, lse and delta, then dq.
    token_ring_bytes = [
        {link: back + (world - 1) * out * (link in next_ranks) for link in pairs}
        for out, back in ((q, q + stat), (2 * q + 2 * stat, q))
    ]
    for schedule, expected in ((ring(world), ring_bytes), (token_ring(world), token_ring_bytes)):
        plan = make_plan(
            world * rows,
            world=world,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype="bfloat16",
            mask=full(),
            schedule=schedule,
        )
        assert counted(plan, batch=batch) == expected
        assert predicted(plan, batch=batch) == expected


def two_ranks(schedule: Schedule, topology: Topology, backward: bool = False) -> tuple[float, float]:
    """(predicted seconds, seconds of one tile) for 2 ranks of 100 rows."""
    plan = make_plan(200, world=2, heads=4, head_dim=16, mask=full(), schedule=schedule)
    return price(plan, topology, backward=backward).seconds, 4 * 100 * 100 * 4 * 16 * (2.5 if backward else 1) / topology.flops


def test_fast_links_hide_behind_compute() -> None:
    seconds, tile = two_ranks(ring(2), FAST)
    assert seconds == pytest.approx(2 * tile, rel=1e-6)
    seconds, tile = two_ranks(ring(2), FAST, backward=True)
    assert seconds == pytest.approx(2 * tile, rel=1e-6)


def test_slow_links_are_waited_for() -> None:
    """KV arrives after latency + bytes / bandwidth, and only then can the second tile begin."""
    slow = Topology("slow", "mesh", flops=1e12, link_latency=0.5, bandwidth=1000.0)
    seconds, tile = two_ranks(ring(2), slow)
    assert seconds == pytest.approx(0.5 + 100 * 4 * 2 * 16 * 4 / 1000 + tile)
    # TokenRing also sends out and lse back to the owner, after the second tile.
    seconds, tile = two_ranks(token_ring(2), slow)
    assert seconds == pytest.approx(0.5 + 100 * 4 * 16 * 4 / 1000 + tile + 0.5 + 100 * 4 * (16 * 4 + 4) / 1000)


def test_messages_queue_for_a_shared_port() -> None:
    world, block = 5, 10 * 4 * 2 * 16 * 4
    plan = make_plan(10 * world, world=world, heads=4, head_dim=16, mask=full(), schedule="all_gather")
    links = {"flops": 1e18, "link_latency": 0.25, "bandwidth": 1e4}
    assert price(plan, Topology("m", "mesh", **links)).seconds == pytest.approx(0.25 + block / 1e4)
    assert price(plan, Topology("s", "switch", **links)).seconds == pytest.approx(0.25 + (world - 1) * block / 1e4)
    # On a ring of 5, of the 4 messages from each rank two go one hop and two go two: 3 messages over every link.
    around = price(plan, Topology("r", "ring", **links, world=world))
    assert around.transfer_seconds == pytest.approx(3 * block / 1e4)
    assert around.seconds == pytest.approx(0.5 + 3 * block / 1e4, rel=0.5)


@pytest.mark.parametrize("topology", PRESETS.values(), ids=lambda t: t.name)
def test_nothing_is_faster_than_its_busiest_rank_and_resource(topology: Topology) -> None:
    for name, make in SCHEDULES.items():
        for mask in (full(), causal()):
            for backward in (False, True):
                plan = make_plan(400, world=8, heads=8, kv_heads=2, head_dim=16, mask=mask, schedule=make(8), layout="zigzag")
                cost = price(plan, topology, backward=backward)
                assert cost.compute_seconds == compute_seconds(plan, topology, backward=backward)
                assert cost.transfer_seconds == transfer_seconds(traffic(plan, backward=backward), topology)
                assert cost.seconds >= max(cost.compute_seconds, cost.transfer_seconds), name
                assert cost.link_bytes == max(traffic(plan, backward=backward).values())
                assert cost.total_bytes == sum(traffic(plan, backward=backward).values())


def test_work_is_what_the_mask_keeps() -> None:
    arguments = {"world": 4, "heads": 4, "head_dim": 16, "schedule": "ring"}
    full_plan, half = (make_plan(400, **arguments, mask=mask, layout="contiguous") for mask in (full(), causal()))
    # The last contiguous shard sees all keys before it and half of its own: 350 of 400 keys for each row, on average.
    assert compute_seconds(half, FAST) / compute_seconds(full_plan, FAST) == pytest.approx(350.5 / 400)
    balanced = make_plan(400, **arguments, mask=causal(), layout="zigzag")
    assert compute_seconds(balanced, FAST) / compute_seconds(full_plan, FAST) == pytest.approx(200.5 / 400)
    assert compute_seconds(full_plan, FAST, backward=True, batch=3) == pytest.approx(7.5 * compute_seconds(full_plan, FAST))


def test_one_rank_only_computes() -> None:
    plan = make_plan(100, world=1, heads=4, head_dim=16)
    cost = price(plan, FAST)
    assert cost.seconds == pytest.approx(cost.compute_seconds) and cost.seconds > 0
    assert (cost.transfer_seconds, cost.link_bytes, cost.total_bytes, cost.buffer_bytes) == (0, 0, 0, 0)


def test_launches_and_merges_have_their_price() -> None:
    """A rank alone: one kernel call, and its result touched MERGE times; out and lse are fp32, as wide as sums are."""
    plan = make_plan(100, world=1, heads=4, head_dim=16)
    slow = replace(FAST, launch=0.5, memory=1e6)
    touched = MERGE * 100 * 4 * (16 + 1) * 4
    assert price(plan, slow).seconds == pytest.approx(price(plan, FAST).seconds + 0.5 + touched / 1e6)


def test_buffers_are_bounded_except_where_all_is_gathered() -> None:
    def buffers(schedule: Any, world: int, backward: bool = False) -> float:
        plan = make_plan(10 * world, world=world, heads=2, head_dim=8, mask=full(), schedule=schedule)
        return price(plan, FAST, backward=backward).buffer_bytes / (10 * 2 * 2 * 8 * 4)  # in blocks of k and v

    assert buffers(ring(8), 8) == buffers(ring(4), 4) == 3, "one in use, one being forwarded, one arriving"
    assert buffers("all_gather", 8) == 2 * 7, "seven arriving, and seven copies being sent"
    assert buffers(token_ring(8), 8, True) == buffers(token_ring(6), 6, True)
