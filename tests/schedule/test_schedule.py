"""Tests that schedules are correct algorithms, and that `check` rejects exactly those that compute wrongly."""

import importlib
from dataclasses import replace

import pytest
from cases import EXACT, HEADS, MASKS, SCHEDULES, Case, example, schedules, simulate, worst

from ringattn import RingAttnError, Schedule, ScheduleError, make_plan
from ringattn.plan.head_groups import HeadGroup
from ringattn.plan.plan import Plan
from ringattn.planner.cost import traffic
from ringattn.schedule import (
    BufferLimits,
    Kind,
    Move,
    bidirectional_ring,
    check,
    parse,
    peak,
    prune,
    ring,
    side_by_side,
    split,
    token_ring,
)
from ringattn.schedule.mesh import mesh
from ringattn.schedule.program import program

checking = importlib.import_module("ringattn.schedule.check")  # the package exports the function of that name
WORLDS = [1, 2, 3, 4, 5, 8, 16]


@pytest.mark.parametrize("world", WORLDS)
def test_every_schedule_is_correct_and_keeps_its_limits(world: int) -> None:
    for schedule in [*schedules(world).values(), *bidirectional_ring(world), side_by_side(*bidirectional_ring(world))]:
        check(schedule)
        assert parse(str(schedule)) == schedule


def test_the_buffer_limits_are_what_is_needed() -> None:
    """Tight: one less is rejected. Buffers do not grow with the number of ranks."""
    for world in (8, 16):
        for schedule in schedules(world).values():
            assert peak(schedule) == schedule.limits
            for n, blocks in enumerate(schedule.limits):
                if blocks:
                    short = BufferLimits(*(r - (m == n) for m, r in enumerate(schedule.limits)))
                    with pytest.raises(ScheduleError, match="more than the promised"):
                        check(replace(schedule, limits=short))


@pytest.mark.parametrize("world", WORLDS)
def test_moves_are_the_closed_form(world: int) -> None:
    def count(schedule: Schedule) -> dict[Kind, int]:
        return {kind: sum(m.kind is kind for m in schedule.moves) for kind in Kind}

    pairs = world * (world - 1)
    for routing in ("hop", "direct"):
        assert count(ring(world, routing=routing)) == {Kind.Q: 0, Kind.KV: pairs, Kind.Q_ACC: 0, Kind.KV_ACC: pairs}
        assert count(token_ring(world, routing=routing)) == {Kind.Q: pairs, Kind.KV: 0, Kind.Q_ACC: pairs, Kind.KV_ACC: 0}


def test_token_ring_uses_both_directions_and_never_moves_keys() -> None:
    schedule = token_ring(4)
    assert {(m.dst - m.src) % 4 for m in schedule.moves if m.kind is Kind.Q} == {1}
    assert all(m.dst == schedule.owner(m.kind, m.index) for m in schedule.moves if m.kind is Kind.Q_ACC)


def test_direct_routing_uses_every_link_of_a_full_mesh_at_once() -> None:
    first = [m for m in token_ring(4, routing="direct").moves if m.depart == 0]
    assert {(m.src, m.dst) for m in first} == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_prune_drops_what_no_rank_reads() -> None:
    below = {(i, j) for i in range(4) for j in range(i + 1)}  # causal over contiguous shards
    for schedule in schedules(4).values():
        pruned = prune(schedule, below)
        check(pruned, below)
        assert len(pruned.moves) < len(schedule.moves)
    # Turning down, a query visits only ranks that have keys for it: 6 visits and 6 partials.
    assert len(prune(token_ring(4, direction=-1), below).moves) == 12


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_split_schedules_are_correct_too(q: int, kv: int) -> None:
    for world in (1, 2, 3, 5, 8):
        for schedule in [*schedules(world).values(), mesh(world), side_by_side(*bidirectional_ring(world))]:
            split_schedule = split(schedule, q=q, kv=kv)
            check(split_schedule)
            assert len(split_schedule.tiles) == q * kv * len(schedule.tiles)
    with pytest.raises(RingAttnError, match=r"split\(q=0, kv=1\)"):
        split(schedule, q=0)


def test_split_and_prune_send_only_the_halves_that_are_read() -> None:
    """Causal zigzag, in units of one rank's q: TokenRing needs 3/4 of its traffic, the ring too if it turns down."""

    def volume(schedule: Schedule) -> float:
        plan = make_plan(
            8 * 64, world=4, heads=4, head_dim=64, dtype="float64", mask=MASKS["causal"], schedule=schedule, layout="zigzag"
        )
        q_bytes = plan.rows(0) * 4 * 64 * 8
        return sum(traffic(plan).values()) / q_bytes / 4

    lse = 1 / 64  # one more number per row and head beside out
    assert volume(token_ring(4)) == pytest.approx(3 + 3 * (1 + lse))
    assert volume(split(token_ring(4, direction=-1), q=2)) == pytest.approx((3 + 3 * (1 + lse)) * 3 / 4)
    assert volume(ring(4)) == 6.0
    assert volume(split(ring(4), kv=2)) == 5.25
    assert volume(split(ring(4, direction=-1), kv=2)) == 4.5


def test_check_rejects_work_that_the_mask_leaves_empty() -> None:
    with pytest.raises(ScheduleError, match="no work"):
        check(token_ring(2), {(0, 0), (1, 0), (1, 1)})


@pytest.mark.parametrize(
    "bad", [Move(Kind.Q, 0, 0, 0, 0, 1), Move(Kind.Q, 0, 0, 1, 1, 1), Move(Kind.Q, 0, 0, 7, 0, 1)], ids=str
)
def test_malformed_moves_are_named(bad: Move) -> None:
    schedule = token_ring(2)
    with pytest.raises(ScheduleError, match=str(bad)):
        check(replace(schedule, moves=(*schedule.moves, bad)))


def test_bad_arguments_are_named() -> None:
    for wrong in (dict(world=0), dict(world=4, routing="air"), dict(world=4, direction=2), dict(world=4, lookahead=0)):
        with pytest.raises(RingAttnError, match=next(reversed(wrong))):
            token_ring(**wrong)
    with pytest.raises(ScheduleError, match="not a schedule"):
        parse("hello")


def test_ranks_that_disagree_on_the_order_of_messages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`program` lists the same order at both ends; otherwise NCCL would hang and gloo would corrupt data."""

    def unordered(head_groups, sent, rank):
        return tuple(replace(step, post=step.post[:: -1 if rank else 1]) for step in program(head_groups, sent, rank))

    monkeypatch.setattr(checking, "program", unordered)
    twice = split(token_ring(2), q=2)  # two messages on a link in one step
    with pytest.raises(ScheduleError, match="ranks 0 and 1 disagree on the order"):
        check(twice)


def test_steps_before_the_first_are_refused() -> None:
    schedule = token_ring(2)
    with pytest.raises(ScheduleError, match="before the first step"):
        check(replace(schedule, moves=(*schedule.moves, Move(Kind.Q, 0, 0, 1, -1, 0))))
    with pytest.raises(ScheduleError, match="before the first step"):
        check(replace(schedule, tiles=(*schedule.tiles[1:], schedule.tiles[0]._replace(step=-1))))


def mutations(schedule: Schedule):
    """Every schedule that differs by one move dropped, doubled, or sent elsewhere."""
    for n, move in enumerate(schedule.moves):
        before, after = schedule.moves[:n], schedule.moves[n + 1 :]
        yield f"drop {move}", replace(schedule, moves=before + after)
        yield f"double {move}", replace(schedule, moves=(*before, move, move, *after))
        for dst in range(schedule.world):
            if dst not in (move.dst, move.src):
                yield f"{move} to {dst}", replace(schedule, moves=(*before, move._replace(dst=dst), *after))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_check_rejects_exactly_the_mutations_that_compute_wrongly(name: str, mask: str) -> None:
    """Each mutated schedule is run on the simulated transport, and its numbers compared with dense attention."""
    layout = "contiguous" if mask == "causal" else "zigzag"  # contiguous under causal has tiles to prune
    plan = Case(name, layout, mask, "mha", 4, 14).plan()
    e = example(HEADS["mha"], 14, MASKS[mask])
    head_group = plan.forward[0]
    accepted = rejected = 0
    for mutation, mutated in mutations(replace(head_group.schedule, limits=BufferLimits(99, 99, 99, 99))):
        right = runs_right(plan, head_group, mutated, e)
        try:
            check(mutated, head_group.areas.keys())
        except ScheduleError as error:
            assert not right, f"{mutation}: computes the right thing, yet check raises {error}"
            rejected += 1
        else:
            assert right, f"{mutation}: computes wrongly, yet passes"
            accepted += 1
    assert rejected > 0


def runs_right(plan: Plan, head_group: HeadGroup, schedule: Schedule, e) -> bool:
    mutated = replace(head_group)
    vars(mutated)["schedule"] = schedule  # as it is, not pruned
    head_groups = (mutated, *plan.forward[1:])
    try:
        actual = simulate(replace(plan, forward=head_groups, backward=head_groups), e.q, e.k, e.v, e.dout)
    except (KeyError, RingAttnError):  # an item was read or sent that had not arrived
        return False
    return worst(actual, (e.out.detach(), e.lse, *e.grads)) < EXACT


def test_peak_memory_of_a_rank_is_counted_in_blocks_not_ranks() -> None:
    assert peak(ring(16)) == peak(ring(4)) == BufferLimits(kv=2, kv_acc=3)
    assert peak(token_ring(16)) == peak(token_ring(4)) == BufferLimits(q=2, q_acc=3)


def test_schedules_hash_by_content() -> None:
    assert len({token_ring(4), token_ring(4), token_ring(4, direction=-1)}) == 2
