"""Tests closed forms: bytes equal those of `cost`, seconds those of its simulation of every rank, and 4,096 ranks are quick."""

from collections.abc import Iterator
from dataclasses import replace
from time import process_time
from typing import Any

import pytest

from ringattn import Mask, Plan, PlanError, Topology, causal, documents, full, make_plan, sliding_window
from ringattn.planner.closed_form import Family, families, forecast, rank_families
from ringattn.planner.closed_form.clock import Clock
from ringattn.planner.closed_form.family import Inner
from ringattn.planner.closed_form.rounds import Model
from ringattn.planner.closed_form.shifts import Links
from ringattn.planner.cost import Cost, compute_seconds, price
from ringattn.planner.topology import PRESETS
from ringattn.schedule import Schedule, bidirectional_ring, mesh, ring, token_ring
from ringattn.schedule.ulysses import ulysses

HEADS = {"mha": (8, 8), "gqa": (8, 2), "mqa": (8, 1)}
ROWS, DIM, FLOPS = 64, 16, 1e9
TILE = 4 * ROWS * ROWS * 8 * DIM / FLOPS  # seconds of a full tile with all heads
FAST = Topology("fast links", "mesh", flops=FLOPS, bandwidth=1e15)


def members(world: int, *degrees: int) -> Iterator[Family]:
    """All members of the family, with Ulysses of these degrees."""
    for family in families(world, heads=8):
        if family.ulysses in degrees:
            yield family
    if 1 in degrees:
        yield Family("all_gather", 1, 1, world, "direct")


def schedules(family: Family) -> tuple[Schedule, ...]:
    """The schedules that a forecast is for, as data."""
    inner = family.inner
    ahead = {"ring_direct": max(1, min(4, inner - 1)), "all_gather": inner - 1}
    built: Any = {
        "ring": lambda: ring(inner),
        "bidirectional_ring": lambda: bidirectional_ring(inner),
        "token_ring": lambda: token_ring(inner, routing=family.routing),
        "mesh": lambda: mesh(inner, a=family.a),
    }.get(family.name, lambda: ring(inner, routing="direct", lookahead=ahead[family.name]))()
    head_groups = built if isinstance(built, tuple) else (built,)
    members_of = [ulysses(head_group, family.ulysses) if family.ulysses > 1 else (head_group,) for head_group in head_groups]
    return tuple(head_group for member in zip(*members_of, strict=True) for head_group in member)


def planned(family: Family, heads: str, mask: Mask) -> Plan:
    layout = "contiguous" if mask == full() else "zigzag"
    return make_plan(ROWS * family.world, **model(family.world, heads), mask=mask, schedule=schedules(family), layout=layout)


def model(world: int, heads: str) -> dict[str, Any]:
    return dict(world=world, heads=HEADS[heads][0], kv_heads=HEADS[heads][1], head_dim=DIM, dtype="bfloat16")


def forecast_of(family: Family, heads: str, mask: Mask, topology: Topology, *, backward: bool) -> Cost:
    arguments = model(family.world, heads) | {"mask": mask, "topology": topology, "backward": backward}
    return forecast(family, seq_len=ROWS * family.world, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("world", range(2, 13))
@pytest.mark.parametrize("heads", HEADS)
def test_bytes_are_exact_and_buffers_bounded(heads: str, world: int) -> None:
    degrees = (1, 2, 4, 8) if world in (4, 8) else (1,)
    for family in members(world, *degrees):
        plan = planned(family, heads, full())
        for backward in (False, True):
            forecast_cost, counted = (
                forecast_of(family, heads, full(), FAST, backward=backward),
                price(plan, FAST, backward=backward),
            )
            case = f"{family} backward={backward}"
            assert (forecast_cost.link_bytes, forecast_cost.total_bytes) == (counted.link_bytes, counted.total_bytes), case
            assert counted.buffer_bytes <= forecast_cost.buffer_bytes <= 1.3 * counted.buffer_bytes, case
            assert forecast_cost.compute_seconds == pytest.approx(counted.compute_seconds), case


def links(world: int) -> Iterator[Topology]:
    """Transfers from hidden to dominant, without latency and with much of it."""
    for ratio in (0.3, 1, 4):
        for latency in (0.0, 0.3 * TILE):
            rate = ROWS * 8 * DIM * 2 / TILE / ratio
            plain = Topology("links", "mesh", FLOPS, latency, rate)
            yield plain
            yield replace(plain, kind="switch", bandwidth=3 * rate)
            yield replace(plain, kind="ring", bandwidth=2 * rate, world=world)
            for size in (2, 4, 8):
                uplink = {"kind": "nodes", "node_size": size, "bandwidth": 8 * rate, "uplink_latency": 2 * latency}
                yield replace(plain, **uplink, uplink_bandwidth=size * rate)
                yield replace(plain, **uplink, uplink_bandwidth=rate, uplink_shared=False)
            yield replace(plain, launch=latency / 3, memory=3 * rate)


@pytest.mark.slow
def test_seconds_are_those_of_the_simulation_of_every_rank() -> None:
    """Mostly equal, nearly always within 15 %, and never more than 25 % off."""
    errors: list[float] = []
    for n, (world, family) in enumerate((w, f) for w in (2, 3, 4, 6, 8, 9, 12) for f in members(w, 1, *[2, 4][: w in (4, 8)])):
        heads, mask, backward = list(HEADS)[n % 3], (full(), causal())[n % 2], n % 4 > 1
        plan = planned(family, heads, mask)
        for topology in links(world):
            simulated = price(plan, topology, backward=backward).seconds
            closed_form = forecast_of(family, heads, mask, topology, backward=backward).seconds
            errors.append(abs(closed_form / simulated - 1))
    assert max(errors) < 0.25
    assert sum(error < 0.15 for error in errors) > 0.99 * len(errors) > 3000
    assert sum(error < 0.001 for error in errors) > 0.6 * len(errors)


@pytest.mark.parametrize("world", [4096, 100_000])
@pytest.mark.parametrize("shared", [True, False], ids=["uplink", "rails"])
def test_thousands_of_ranks_are_priced_in_few_steps(world: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    post = Clock._post

    def counted(self: Clock, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        post(self, *arguments)

    monkeypatch.setattr(Clock, "_post", counted)
    topology = replace(PRESETS["infiniband"], uplink_shared=shared)
    begin = process_time()
    forecasts = rank_families(world * 1024, **model(world, "gqa") | {"heads": 32}, mask=causal(), topology=topology)
    assert process_time() - begin < 2 * 2, "2 seconds, and as much again for a busy machine"
    assert steps < 400 * len(forecasts), "a few steps of one rank, not all steps of all ranks"
    grids = {(member.family.ulysses, member.family.a, member.family.b) for member in forecasts}
    assert {u * a * b for u, a, b in grids} == {world} and len(grids) > 60
    assert [member.seconds for member in forecasts] == sorted(member.seconds for member in forecasts)
    assert (
        min(member.forward.compute_seconds for member in forecasts) > 0 and min(member.buffer_bytes for member in forecasts) > 0
    )


def test_extrapolation_equals_simulating_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rounds are extrapolated; simulating them in full gives the same time, occupation and buffers."""
    chosen = [family for family in families(120, heads=2) if family.a in (1, 2, 15, 120)]
    for topology in (FAST, *links(120)):
        if topology.kind != "ring":  # its steps all differ, and are simulated anyway
            extrapolated = [forecast_of(family, "gqa", full(), topology, backward=True) for family in chosen]
            with monkeypatch.context() as context:
                context.setattr(Clock, "_round", _simulate_all)
                simulated = [forecast_of(family, "gqa", full(), topology, backward=True) for family in chosen]
            for family, member, other in zip(chosen, extrapolated, simulated, strict=True):
                assert member.seconds == pytest.approx(other.seconds, rel=0.02), f"{family} on {topology}"
                assert member.buffer_bytes == other.buffer_bytes, f"{family} on {topology}"


@pytest.mark.parametrize("world", [48, 120])
def test_within_a_round_every_step_loads_the_links_alike(world: int) -> None:
    moving = 0
    for topology in links(world):
        table = Links(topology, world)
        for family in members(world, 1, 2, 8):
            for round_ in Inner(family, Model(8, 2, DIM, "bfloat16", 1), ROWS, backward=True).rounds(table):
                for post in round_.posts:
                    loads = {table.load(post.axis, post.offset + n * post.slope) for n in range(round_.count)}
                    assert len(loads) <= 1, f"{family} on {topology}: {post} for {round_.count} steps"
                    moving += round_.count > 8 and post.slope != 0
    assert moving > 100, "long rounds with moving shifts must be among them"


def _simulate_all(clock: Clock, round_: Any) -> None:
    clock._simulate(round_, range(round_.count))


def test_work_is_what_the_mask_keeps() -> None:
    family, ranks = Family("ring", 1, 1, 4), 4 * ROWS

    def share(mask: Mask, layout: str = "zigzag") -> float:
        arguments = model(4, "mha") | {"topology": FAST, "layout": layout}
        return forecast(family, seq_len=ranks, mask=mask, **arguments).compute_seconds / (4 * TILE)

    assert share(full()) == pytest.approx(1)
    assert share(causal()) == pytest.approx((ranks + 1) / (2 * ranks)), "zigzag balances it exactly"
    assert share(sliding_window(7)) == pytest.approx((8 * ranks - 28) / ranks**2)
    assert share(documents((0, 64, ranks), causal=False)) == pytest.approx((64**2 + 192**2) / ranks**2)
    plan = make_plan(ranks, **model(4, "mha"), mask=causal(), schedule="ring", layout="contiguous")
    assert share(causal(), "contiguous") == pytest.approx(compute_seconds(plan, FAST) / (4 * TILE)), "the last rank bounds it"


def test_rails_speed_up_what_crosses_nodes_at_once() -> None:
    shared = PRESETS["infiniband"]
    rails = replace(shared, uplink_shared=False)
    for family, gain in ((Family("ring", 1, 1, 64), 1), (Family("all_gather", 1, 1, 64, "direct"), 8)):
        slow, fast = (forecast_of(family, "mha", full(), topology, backward=False) for topology in (shared, rails))
        assert slow.transfer_seconds == pytest.approx(gain * fast.transfer_seconds), family.name


def test_a_measured_matrix_counts_as_its_slowest_link_for_any_number_of_ranks() -> None:
    rates = ((1.0, 5e9, 4e9), (3e9, 1.0, 5e9), (6e9, 7e9, 1.0))
    waits = ((0.0, 1e-5, 2e-5), (1e-5, 0.0, 1e-5), (1e-5, 1e-5, 0.0))
    measured = Topology("here", "matrix", FLOPS, world=3, latencies=waits, bandwidths=rates)
    for port, plain in ((None, Topology("m", "mesh", FLOPS, 2e-5, 3e9)), (2e9, Topology("s", "switch", FLOPS, 2e-5, 2e9))):
        for family in members(16, 1, 2):
            forecast_cost = forecast_of(family, "gqa", full(), replace(measured, port=port), backward=True)
            assert forecast_cost == forecast_of(family, "gqa", full(), plain, backward=True)


def test_heads_that_do_not_divide_are_bound_by_the_busiest_rank() -> None:
    family = Family("ring", 4, 1, 2)
    plan = make_plan(512, world=8, heads=9, kv_heads=3, head_dim=DIM, mask=full(), schedule=schedules(family))
    arguments = dict(seq_len=512, world=8, heads=9, kv_heads=3, head_dim=DIM, dtype="float32", mask=full(), topology=FAST)
    forecast_cost, counted = forecast(family, **arguments), price(plan, FAST)
    assert forecast_cost.compute_seconds == pytest.approx(counted.compute_seconds)
    assert counted.total_bytes < forecast_cost.total_bytes < 1.5 * counted.total_bytes


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="a ring of 8 ranks and world=4"):
        forecast_of(
            Family("ring", 1, 1, 4), "mha", full(), Topology("r", "ring", FLOPS, bandwidth=1e9, world=8), backward=False
        )
    with pytest.raises(PlanError, match="is for 4 ranks"):
        forecast(Family("ring", 1, 1, 4), seq_len=64, **model(8, "mha"), mask=full(), topology=FAST)
    with pytest.raises(PlanError, match="16 heads or more"):
        forecast_of(Family("ring", 16, 1, 1), "mha", full(), FAST, backward=False)
    for wrong in (
        ("ring", 1, 2, 4),
        ("token_ring", 1, 2, 2),
        ("mesh", 1, 0, 4),
        ("star", 1, 1, 4),
        ("ring", 1, 1, 4, "direct"),
    ):
        with pytest.raises(PlanError):
            Family(*wrong)
