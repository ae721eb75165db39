"""Tests Ulysses as a schedule: resident inputs, bytes that travel, saved memory, and heads that do not divide."""

from math import ceil

import pytest
import torch
from cases import EXACT, HEADS, MASKS, example, simulate, worst
from hypothesis import given
from hypothesis import strategies as st

from ringattn import PlanError, Schedule, causal, full, make_plan
from ringattn.plan.head_groups import share_heads
from ringattn.planner.cost import traffic
from ringattn.schedule import Kind, check, mesh, parse, ring, split, take_turns, token_ring, ulysses
from ringattn.schedule.ulysses import resharded


def make(schedule: Schedule | str = "ring", *, world: int = 4, heads: int = 8, kv_heads: int = 8, mask=None, **more):
    arguments = dict(world=world, heads=heads, kv_heads=kv_heads, head_dim=8, dtype="float64", mask=mask or full())
    return make_plan(more.pop("length", 32), **arguments | dict(schedule=schedule) | more)


@pytest.mark.parametrize("inner", [ring(1), ring(2), token_ring(3), mesh(4), split(token_ring(2), q=2)], ids=lambda s: s.name)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_head_group_is_an_algorithm_and_is_read_back(inner: Schedule, degree: int, stages: int, groups: int) -> None:
    head_groups = ulysses(inner, degree, stages=stages, groups=groups)
    assert len(head_groups) == degree * groups
    for head_group in head_groups:
        check(head_group)
        assert parse(str(head_group)) == head_group and head_group.has_residents
        assert {head_group.resident_rank(Kind.KV, j) % degree for j in range(len(head_group.kv_owner))} == {
            tile.rank % degree for tile in head_group.tiles
        }


def test_the_exchange_is_as_small_as_an_all_to_all() -> None:
    """(2 + 2/g)(u - 1)/u of a rank's q forward; backward dout in, dq, dk and dv back, and row statistics; no k, no v."""
    plan = make(world=4, ulysses=4, dtype="bfloat16")
    of_q = 32 * 8 * 8 * 2 * 3 // 4  # all ranks' q in bytes, three quarters of which leave
    rows = 32 * 8 * 4 * 3 // 4  # of one fp32 number for each row and head
    assert sum(traffic(plan).values()) == 4 * of_q + rows
    assert sum(traffic(plan, backward=True).values()) == 4 * of_q + 2 * rows
    assert plan.reuse_inputs and not make(world=4, ulysses=1).reuse_inputs


def test_kv_heads_fewer_than_the_degree_are_sent_to_every_rank_that_needs_them() -> None:
    plan = make(world=4, heads=8, kv_heads=2, ulysses=4)
    assert [head_group.heads for head_group in plan.forward] == [(0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2)]


def test_saved_for_backward_is_no_more_than_without() -> None:
    """Resident inputs replace the rank's own q, k, v; they are as large."""
    heads, mask = HEADS["mha"], MASKS["full"]
    e = example(heads, 32, mask)
    sizes = {}
    for degree in (1, 4):
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        plan = make(heads=heads[0], kv_heads=heads[1], ulysses=degree)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            actual = simulate(plan, e.q, e.k, e.v, e.dout)
        assert worst(actual, (e.out.detach(), e.lse.detach(), *e.grads)) < EXACT
        sizes[degree] = sum(saved.values())
    assert sizes[4] <= sizes[1]


@pytest.mark.parametrize(("heads", "world"), [((9, 3), 4), ((6, 6), 4), ((9, 9), 4), ((10, 2), 4), ((5, 1), 3)])
def test_heads_that_do_not_divide(heads: tuple[int, int], world: int) -> None:
    for mask in (full(), causal()):
        e = example(heads, 29, mask)
        for schedule, degree in (("ring", world), ("token_ring", 2 if world == 4 else 3)):
            plan = make(schedule, world=world, heads=heads[0], kv_heads=heads[1], mask=mask, ulysses=degree, length=29)
            actual = simulate(plan, e.q, e.k, e.v, e.dout)
            assert worst(actual, (e.out.detach(), e.lse.detach(), *e.grads)) < EXACT, (schedule, degree)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12))
def test_shares_of_heads(kv_heads: int, group: int, parts: int) -> None:
    shares = share_heads(kv_heads * group, kv_heads, parts)
    runs = [run for share in shares for run in share]
    assert len(shares) == parts
    assert [h for run in runs for h in range(run.q_start, run.q_stop)] == list(range(kv_heads * group)), "every head once"
    for run in runs:
        assert run.of_queries % run.of_keys == 0
        each = run.of_queries // run.of_keys
        for n in range(run.of_queries):
            assert run.kv_start + n // each == (run.q_start + n) // group, "queries keep their KV head"
    assert max(sum(run.of_queries for run in share) for share in shares) == min(
        ceil(kv_heads / parts) * group, ceil(kv_heads * group / parts)
    )


def test_one_kernel_call_for_what_has_arrived() -> None:
    plain, staged = (make(ulysses(ring(1), 4, stages=s)) for s in (0, 3))
    assert [len(step.tiles) for step in plain.program(0, backward=False) if step.tiles] == [1]
    calls = [tile for step in staged.program(0, backward=False) for tile in step.tiles]
    assert len(calls) == 7, "own rows, then twice for each arrival: new queries, and old ones against new keys"
    assert sum(len(call.i) * len(call.j) for call in calls) == 16


def test_parts_take_turns() -> None:
    schedule = take_turns(token_ring(4, routing="direct"), q=2)
    at_zero = [tile.i for tile in schedule.tiles if tile.rank == 0]
    assert at_zero == [0, 1, 6, 4, 2, 7, 5, 3], "own rows, then the first halves of all others, then the second"
    with pytest.raises(PlanError, match="blocks that hop cannot take turns"):
        take_turns(ring(3), kv=2)
    with pytest.raises(PlanError, match="cut queries or keys"):
        take_turns(token_ring(3, routing="direct"), q=2, kv=2)


def test_what_cannot_be_resharded_is_refused() -> None:
    with pytest.raises(PlanError, match="is resharded already"):
        ulysses(ulysses(ring(1), 2)[0], 2)
    with pytest.raises(PlanError, match="one of the group"):
        resharded(ring(2), 2, 2)
