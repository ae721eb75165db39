"""Tests the layout for packed documents: documents stay on one rank as far as balance allows, and few bytes travel."""

from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random
from time import process_time
from typing import Any

import pytest
from cases import EXACT, example, simulate, worst
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, documents, full, make_plan, sliding_window
from ringattn.planner import Candidate, candidates
from ringattn.planner.cost import traffic
from ringattn.schedule import ring, split
from ringattn.sequence.document_layout import EVEN, DocumentRun, _distribute, by_documents
from ringattn.sequence.layout import contiguous

MODEL: dict[str, Any] = dict(heads=8, kv_heads=2, head_dim=64, dtype="bfloat16")


def work(layout: Layout, bounds: tuple[int, ...]) -> list[int]:
    """Causal (query, key) pairs of every rank, when each computes all of its own queries."""
    first = {p: a for a, b in pairwise(bounds) for p in range(a, b)}
    return [sum(p - first[p] + 1 for p in layout.positions(rank)) for rank in range(layout.world)]


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum), world=st.integers(1, 7))
def test_every_position_is_held_once_and_rows_are_even(lengths: list[int], world: int) -> None:
    bounds = (0, *accumulate(lengths))
    layout = by_documents(bounds, world)
    layout.validate(bounds[-1])
    rows = [layout.rows(rank) for rank in range(world)]
    assert max(rows) <= max(EVEN * bounds[-1] / world, min(rows) + 2), "within 5 %, or no more than two apart"


def mixed(total: int, seed: int) -> tuple[int, ...]:
    """Documents of a few dozen to a quarter of all tokens, most of them short, as in pre-training mixes."""
    source, bounds = Random(seed), [0]
    while bounds[-1] < total:
        bounds.append(min(total, bounds[-1] + min(total // 4, int(32 * source.paretovariate(0.7)))))
    return tuple(bounds)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_work_is_even_and_little_travels(world: int, seed: int) -> None:
    bounds = mixed(16384, seed)
    layout = by_documents(bounds, world)
    done = work(layout, bounds)
    assert max(done) <= EVEN * sum(done) / world
    assert sum(len(shard) for shard in layout.shards) < len(bounds) + 2 * world * 24, "most documents are uncut"
    runs = [DocumentRun(b - a, a, b - a) for a, b in pairwise(bounds)]
    cut = Layout("all cut", tuple(map(tuple, _distribute(runs, world, 0)[2])))
    plans = [
        make_plan(16384, world=world, **MODEL, mask=documents(bounds), layout=chosen, schedule="ring_direct")
        for chosen in (layout, cut)
    ]
    assert plans[0].balance <= EVEN + 0.01
    assert sum(traffic(plans[0]).values()) < 0.9 * sum(traffic(plans[1]).values())


def test_documents_that_fill_a_rank_each_stay_there() -> None:
    plan = make_plan(4096, world=8, **MODEL, mask=documents(range(0, 4097, 512)))
    assert not any(head_group.schedule.moves for head_group in plan.forward) and plan.balance == pytest.approx(1.0)


def test_the_planner_takes_it_where_contiguous_is_uneven() -> None:
    bounds = (0, 3000, 3100, 3200, 3300, 4096)
    plan = make_plan(4096, world=4, **MODEL, mask=documents(bounds), schedule="ring", topology="cpu")
    assert str(plan.layout) == "documents" and plan.balance < 1.06
    assert "the busiest with 1.0" in str(plan)


@pytest.mark.parametrize("causally", [True, False])
@pytest.mark.parametrize("schedule", ["ring", "token_ring", "mesh", "all_gather"])
def test_it_is_exact(schedule: str, causally: bool) -> None:
    mask = documents((0, 3, 4, 5, 6, 20, 37, 37, 60, 61), causal=causally)
    for windowed in (mask, mask & sliding_window(6)):
        e = example((4, 2), 61, windowed)
        for world in (2, 3, 5):
            arguments = dict(world=world, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=windowed, schedule=schedule)
            plan = make_plan(61, layout="documents", **arguments)
            actual = simulate(plan, e.q, e.k, e.v, e.dout)
            assert worst(actual, (e.out.detach(), e.lse.detach(), *e.grads)) < EXACT


@pytest.mark.parametrize("bounds", [(0, *range(1500, 4097)), (*range(2597), 4096)], ids=["right", "left"])
def test_padding_is_planned_as_one_document(bounds: tuple[int, ...]) -> None:
    """4,096 tokens, 2,596 of which are padding and documents of one row each.

    As thousands of rectangles they would take seconds to plan, and thousands of kernel calls to compute.
    """
    for layout in ("contiguous", "documents", "zigzag"):
        plan = make_plan(4096, world=2, **MODEL, mask=documents(bounds), layout=layout, schedule="ring")
        assert max(map(len, plan.layout.shards)) <= 4
        (head_group,) = plan.forward
        assert sum(len(head_group.tiles.segments((i,), (j,))) for i, j in head_group.areas) <= 16
    even = make_plan(4096, world=2, **MODEL, mask=documents(bounds), layout="documents", schedule="ring")
    assert even.balance < 1.01 and abs(even.rows(0) - even.rows(1)) <= 1


@given(rows=st.lists(st.integers(1, 3), min_size=1, max_size=12), causally=st.booleans())
def test_documents_of_one_row_see_the_same_keys_as_before(rows: list[int], causally: bool) -> None:
    bounds = (0, *accumulate(rows))
    mask, positions = documents(bounds, causal=causally), range(bounds[-1])
    near = {(q, k) for q in positions for k in positions for r in mask.near(q, q + 1) if replace(mask, rects=(r,)).keeps(q, k)}
    assert near == {(q, k) for q in positions for k in positions if mask.keeps(q, k)}
    assert sum(r.q_stop - r.q_start for r in mask.near(0, bounds[-1])) == bounds[-1], "each row once"


@pytest.mark.slow
def test_planning_a_thousand_documents_again_takes_no_time() -> None:
    """The first call may be slow; later calls read a cache, whose key includes the mask by value."""
    bounds = mixed(65536, 0)
    while len(bounds) < 1001:
        bounds = tuple(sorted({*bounds, *(a + (b - a) // 2 for a, b in pairwise(bounds) if b - a > 30)}))
    arguments = dict(world=8, **MODEL, topology="nvswitch")
    seconds, plans = [], []
    for _ in range(10):
        begin = process_time()
        plans.append(make_plan(65536, **arguments, mask=documents(bounds)))
        seconds.append(process_time() - begin)
    first, *again = seconds
    assert all(plan is plans[0] for plan in plans)
    assert min(again) < first / 50, (
        "hashing a mask of a thousand documents is far cheaper than planning; both times are of this machine"
    )


@pytest.mark.slow
def test_bytes_of_a_window_grow_with_the_window_and_not_with_the_sequence() -> None:
    """A rank sends only the keys that the rows after its own look back to."""

    def sent(length: int, window: int, **arguments: Any) -> int:
        plan = make_plan(length, world=8, **MODEL, mask=sliding_window(window), topology="cpu", training=False, **arguments)
        return sum(traffic(plan).values())

    key, query = 2 * 2 * 64 * 2, 2 * 8 * 64 * 2 + 8 * 4  # bytes: k and v of 2 heads; q and out of 8, and lse
    for window in (16, 64, 256):
        for length in (8192, 65536):
            assert sent(length, window, schedule="ring") == 7 * window * key
            assert sent(length, window) in (7 * window * key, 7 * window * query), "auto moves either of them"


def test_what_no_document_layout_is_better_than_keeps_its_name() -> None:
    options = candidates(4096, world=4, **MODEL, mask=documents((0, 1024, 2048, 3072, 4096)))
    assert {str(option.plan.layout) for option in options} == {"contiguous"}
    assert isinstance(options[0], Candidate)


def test_one_document_is_a_batch_too() -> None:
    plan = make_plan(64, world=4, **MODEL, mask=documents((0, 64)), layout="documents", schedule="ring")
    assert plan.layout.length == 64 and plan.balance == pytest.approx(1.0, abs=0.05)


def test_trimming_is_part_of_the_plan_and_not_of_the_layout() -> None:
    """The layout of a trimmed plan is the plain one; a schedule passed as data is cut evenly, into its own number of blocks."""
    arguments = dict(world=8, **MODEL, mask=sliding_window(64), layout="contiguous")
    trimmed = make_plan(8192, **arguments, schedule="ring", topology="cpu")
    assert "trimmed" in trimmed.labels[0] and trimmed.layout == contiguous(8192, 8)
    assert [block.rows for block in trimmed.forward[0].kv_blocks[:3]] == [960, 64, 0]
    even = make_plan(8192, **arguments, schedule=split(ring(8), kv=3))
    assert [block.rows for block in even.forward[0].kv_blocks[:3]] == [342, 341, 341]
    untrimmed = make_plan(8192, **arguments | {"mask": full()}, schedule="ring")
    assert untrimmed == make_plan(8192, **arguments | {"mask": full(), "layout": trimmed.layout}, schedule="ring")


@pytest.mark.parametrize("name", ["ring", "ring_direct", "bidirectional_ring", "token_ring", "mesh", "all_gather"])
def test_every_name_trims(name: str) -> None:
    arguments = dict(world=8, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=sliding_window(9), layout="contiguous")
    options = candidates(240, **arguments, schedule=name)
    least = min(options, key=lambda option: sum(traffic(option.plan).values()))
    untrimmed = min((o for o in options if not o.named.trimmed), key=lambda option: sum(traffic(option.plan).values()))
    assert least.named.trimmed and sum(traffic(least.plan).values()) < sum(traffic(untrimmed.plan).values())
    e = example((4, 2), 240, sliding_window(9), batch=1)
    actual = simulate(least.plan, e.q, e.k, e.v, e.dout)
    assert worst(actual, (e.out.detach(), e.lse.detach(), *e.grads)) < EXACT
