"""Tests `make_plan`: errors name the argument and a hint; its choice is the cheapest, exact, and the same on every rank."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import EXACT, example, simulate, worst
from torch.distributed.device_mesh import DeviceMesh

from ringattn import Layout, Plan, PlanError, ScheduleError, Topology, causal, documents, full, make_plan, sliding_window
from ringattn.kernels import KERNELS as REAL_KERNELS
from ringattn.planner import KERNELS, Candidate, candidates
from ringattn.planner.cost import price
from ringattn.planner.search import LAYOUT_TIE, TIE
from ringattn.planner.topology import PRESETS
from ringattn.schedule import bidirectional_ring, ring, token_ring
from ringattn.schedule.catalog import NAMES
from ringattn.sequence.layout import Span, contiguous
from ringattn.sequence.mask import Mask

USUAL: dict[str, Any] = {"seq_len": 64, "world": 4, "heads": 8, "kv_heads": 2, "head_dim": 16}
SLOW_LINKS = Topology("slow links", "mesh", flops=1e15, link_latency=1e-6, bandwidth=1e9)


def plan(**changes: Any) -> Plan:
    return make_plan(**(USUAL | changes))


def names(head_groups: Any) -> list[str]:
    return [head_group.schedule.name for head_group in head_groups]


class Sized:
    """Has the methods of a ProcessGroup that the planner uses."""

    def __init__(self, ndim: int = 1) -> None:
        self.ndim = ndim

    def size(self) -> int:
        return 4


BAD = [
    ({"seq_len": 0}, "seq_len=0; must be 1 or more"),
    ({"seq_len": 6.5}, "seq_len=6.5; must be a whole number"),
    ({"world": 0}, "world=0; must be 1 or more"),
    ({"world": "four"}, "world='four'; must be a whole number"),
    ({"world": Sized(ndim=2)}, "world has 2 dimensions"),
    ({"heads": -8}, "heads=-8"),
    ({"kv_heads": 3}, "heads=8 is not a multiple of kv_heads=3"),
    ({"kv_heads": 0}, "kv_heads=0"),
    ({"head_dim": None}, "head_dim=None"),
    ({"dtype": "int8"}, "dtype='int8'; choose one of float64, float32, bfloat16, float16"),
    ({"dtype": torch.complex64}, "dtype='complex64'"),
    ({"mask": "causal"}, r"mask='causal'; call one of full\(\)"),
    ({"mask": causal}, "call one of"),
    ({"mask": documents((0, 30, 63))}, "is for 63 tokens and seq_len=64"),
    ({"schedule": "tokenring"}, "schedule='tokenring'; choose one of auto, ring"),
    ({"schedule": 7}, "schedule=7; pass a name"),
    ({"schedule": ()}, r"schedule=\(\)"),
    ({"schedule": ring(3)}, "schedule 'ring' is for 3 ranks and world=4"),
    ({"schedule": (ring(4), ring(4), ring(4)), "heads": 2, "kv_heads": 2}, "3 head groups and heads=2 are too few"),
    (
        {"schedule": (token_ring(4), token_ring(4)), "heads": 1, "kv_heads": 1},
        "2 schedules need as many heads, and there are 1",
    ),
    ({"layout": "diagonal"}, "layout='diagonal'; choose one of auto, contiguous, zigzag, striped"),
    ({"layout": contiguous(64, 5)}, "has 5 shards and world=4"),
    ({"layout": contiguous(60, 4)}, "position 60 .* held by no rank"),
    ({"layout": Layout("twice", ((Span(0, 64),), (Span(3, 1),), (), ()))}, "held twice"),
    ({"ulysses": 3}, r"ulysses=3 does not divide world=4; choose one of \[1, 2, 4\]"),
    ({"ulysses": 4, "heads": 2, "kv_heads": 2}, r"leaves some ranks none of the 2 heads; choose one of \[1, 2\]"),
    ({"ulysses": 2, "schedule": ring(4)}, "schedule 'ring' is for 4 ranks and world=4, ulysses=2; build it for 2"),
    ({"ulysses": 0}, "ulysses=0"),
    ({"ulysses": "all"}, "ulysses='all'"),
    ({"kernel": "flash5"}, "kernel='flash5'; choose one of auto, sdpa, reference"),
    ({"topology": "infinband"}, "topology='infinband'; choose one of pcie, nvlink"),
    ({"topology": 3}, "topology=3"),
    ({"topology": Topology("six", "ring", 1e9, 0.0, 1e9, world=6)}, "topology 'six' describes 6 ranks and world=4"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_invalid_arguments_are_refused_with_a_hint(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**changes)


def test_a_schedule_that_is_no_algorithm_is_refused() -> None:
    good = ring(4)
    with pytest.raises(ScheduleError):
        plan(schedule=type(good)(**{**{f: getattr(good, f) for f in good.__dataclass_fields__}, "moves": good.moves[1:]}))


def test_the_kernels_are_those_that_exist() -> None:
    assert set(KERNELS) == set(REAL_KERNELS)
    assert plan().kernel == "sdpa" and plan(kernel="reference").kernel == "reference"


@pytest.mark.slow
def test_the_same_arguments_give_the_same_object() -> None:
    first = plan(dtype="bfloat16")
    assert first is plan(dtype=torch.bfloat16, mask=causal(), topology="infiniband", ulysses=None, world=Sized())
    assert first is not plan(dtype=torch.float16)
    assert plan(kv_heads=None).kv_heads == 8


def test_world_may_be_a_mesh_or_a_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert plan(world=dist.group.WORLD) is plan(world=1)
        assert plan(world=DeviceMesh("cpu", [0], mesh_dim_names=("sequence",))) is plan(world=1)
        with pytest.raises(PlanError, match="world has 2 dimensions"):
            plan(world=DeviceMesh("cpu", [[0]], mesh_dim_names=("data", "sequence")))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(150)  # three processes, one after another
def test_every_rank_finds_the_same_plan() -> None:
    """Other processes, other hash seeds: the same digests."""
    code = (
        "from ringattn import make_plan\n"
        "for t in ('nvlink', 'cpu'):\n"
        "    print(make_plan(999, world=4, heads=6, kv_heads=2, head_dim=16, topology=t).digest)"
    )
    digests = [make_plan(999, world=4, heads=6, kv_heads=2, head_dim=16, topology=t).digest for t in ("nvlink", "cpu")]
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
        assert ran.stdout.split() == digests, ran.stderr


def selected(chosen: Plan, options: list[Candidate], backward: bool) -> Candidate:
    """The candidate that `chosen` took for one pass."""
    head_groups = chosen.backward if backward else chosen.forward
    return next(
        c
        for c in options
        if c.plan.layout == chosen.layout and [x.schedule for x in c.plan.forward] == [x.schedule for x in head_groups]
    )


def cheapest(options: list[Candidate]) -> float:
    """Seconds of the cheapest pair of passes; a candidate that reuses inputs from forward is a pair with itself only."""
    free = [c for c in options if not c.plan.reuse_inputs]
    apart = sum(min(c.cost(backward=b).seconds for c in free) for b in (False, True))
    return min([apart, *(sum(c.cost(backward=b).seconds for b in (False, True)) for c in options if c.plan.reuse_inputs)])


CAUSAL_FULL, SHORT_WINDOW = ((causal(), 8, 20_000), (full(), 8, 20_000)), ((causal(), 1, 500), (sliding_window(40), 2, 5000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "masks"),
    [
        (PRESETS["nvlink"], SHORT_WINDOW),
        (PRESETS["rails"], CAUSAL_FULL),
        (PRESETS["cpu"], SHORT_WINDOW),
        (SLOW_LINKS, CAUSAL_FULL + SHORT_WINDOW),
    ],
    ids=lambda value: value.name if isinstance(value, Topology) else "",
)
def test_nothing_that_was_allowed_is_clearly_cheaper(topology: Topology, masks: tuple[tuple[Mask, int, int], ...]) -> None:
    for mask, kv_heads, length in masks:
        arguments = {"world": 6, "heads": 8, "kv_heads": kv_heads, "head_dim": 64, "mask": mask, "topology": topology}
        chosen, options = make_plan(length, **arguments), candidates(length, **arguments)
        paid = sum(selected(chosen, options, b).cost(backward=b).seconds for b in (False, True))
        possible = min(cheapest([c for c in options if c.plan.layout == layout]) for layout in {c.plan.layout for c in options})
        assert possible <= paid <= TIE * LAYOUT_TIE * possible, (str(mask), kv_heads, length)


def test_bytes_decide_where_compute_hides_everything() -> None:
    patient = Topology("patient", "switch", flops=1e6, link_latency=0.0, bandwidth=1e15)
    arguments = USUAL | {"mask": full(), "topology": patient}
    chosen, options = make_plan(**arguments), candidates(**arguments)
    paid = sum(selected(chosen, options, backward).total_bytes(backward=backward) for backward in (False, True))
    free = [c for c in options if not c.plan.reuse_inputs]
    apart = sum(min(c.total_bytes(backward=backward) for c in free) for backward in (False, True))
    assert paid == min(apart, *(sum(c.total_bytes(backward=b) for b in (False, True)) for c in options if c.plan.reuse_inputs))


def test_layouts_are_changed_for_a_reason() -> None:
    """A causal ring is worth balancing; a window is not: only neighbours need each other; full is balanced as it is."""
    masks = (full(), causal(), sliding_window(256))
    layouts = {str(mask): str(plan(seq_len=65536, mask=mask, schedule="ring").layout) for mask in masks}
    assert layouts == {"full": "contiguous", "causal": "zigzag", "window(256,0)": "contiguous"}


def test_the_links_decide_how_queries_travel() -> None:
    """Each pair has a link of its own: send to several peers at once. Leaving a node is expensive: hop, and leave it once."""
    arguments = USUAL | {"seq_len": 4096, "world": 8, "schedule": "token_ring", "mask": full()}
    assert names(make_plan(**arguments, topology=SLOW_LINKS).forward) == ["token_ring_direct/4x1 in turn"]
    nodes = Topology("nodes", "nodes", 1e15, 1e-6, 1e12, node_size=4, uplink_latency=1e-6, uplink_bandwidth=1e9)
    assert names(make_plan(**arguments, topology=nodes).forward) == ["token_ring"]


def test_few_kv_heads_make_kv_travel() -> None:
    arguments = {"world": 8, "heads": 32, "head_dim": 128, "dtype": "bfloat16", "mask": full(), "topology": "ethernet"}
    head_groups = make_plan(4096, **arguments, kv_heads=1).forward
    assert not any(move.kind.of_queries for head_group in head_groups for move in head_group.schedule.moves)


def test_a_name_is_kept_and_auto_gathers_nothing() -> None:
    for name in ("ring", "bidirectional_ring", "ring_direct", "token_ring", "mesh", "all_gather"):
        options = candidates(**USUAL, schedule=name)
        assert {c.named.name for c in options} == {name}
        assert all(selected(plan(schedule=name), options, backward) for backward in (False, True))
    assert {c.named.name for c in candidates(**USUAL)} - {"balanced"} == {*NAMES, "ulysses 4"} - {"all_gather"}
    assert names(plan(schedule="all_gather").forward) == ["all_gather"]


def test_a_schedule_passed_as_data_is_used() -> None:
    plan_made = plan(schedule=token_ring(4, direction=-1), mask=full())
    assert plan_made.forward[0].schedule == plan_made.backward[0].schedule == token_ring(4, direction=-1)
    assert len(plan(schedule=bidirectional_ring(4)).forward) == 2
    assert len(plan(schedule=list(bidirectional_ring(4)), kv_heads=1).forward) == 1, "two directions share the keys of one head"


@pytest.mark.slow
def test_buffers_can_be_limited() -> None:
    free = make_plan(**USUAL)
    needs = {c.buffer_bytes((False, True)) for c in candidates(**USUAL)}
    tight = make_plan(**USUAL, buffer_limit=min(needs))
    assert max(price(tight, PRESETS["infiniband"], backward=b).buffer_bytes for b in (False, True)) == min(needs)
    assert make_plan(**USUAL, buffer_limit=max(needs)) == free
    with pytest.raises(PlanError, match=f"buffer_limit=1: the least that any allowed plan needs is {min(needs)} bytes"):
        make_plan(**USUAL, buffer_limit=1)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [PRESETS["nvlink"], PRESETS["cpu"], SLOW_LINKS], ids=lambda t: t.name)
def test_for_inference_forward_alone_decides(topology: Topology) -> None:
    for mask, kv_heads in ((full(), 2), (causal(), 8), (causal(), 1)):
        arguments = {"world": 4, "heads": 8, "kv_heads": kv_heads, "head_dim": 64, "mask": mask, "topology": topology}
        trained, chosen = make_plan(4096, **arguments), make_plan(4096, **arguments, training=False)
        options = candidates(4096, **arguments, training=False)
        seconds = [price(p, topology).seconds for p in (chosen, trained)]
        assert seconds[0] <= TIE * seconds[1]
        layout = [c.cost(backward=False).seconds for c in options if c.plan.layout == chosen.layout]
        assert min(layout) <= seconds[0] <= TIE * min(layout)
        assert chosen.forward is chosen.backward, "its backward is that of the same schedule"
    with pytest.raises(PlanError, match="training=1; must be True or False"):
        make_plan(4096, **arguments, training=1)


def test_where_links_are_slow_a_schedule_is_made_for_the_mask() -> None:
    """Nine heads do not divide here; no published schedule moves as few bytes."""
    arguments = dict(seq_len=4096, world=4, heads=9, kv_heads=3, head_dim=64, dtype="bfloat16", topology=SLOW_LINKS)
    chosen, published = make_plan(**arguments, mask=causal()), candidates(**arguments, mask=causal())
    assert chosen.labels[0].startswith("balanced")
    seconds = [price(chosen, SLOW_LINKS, backward=b).seconds for b in (False, True)]
    others = [c for c in published if not str(c.named).startswith("balanced")]
    assert sum(seconds) < min(sum(c.cost(backward=b).seconds for b in (False, True)) for c in others)
    assert make_plan(**arguments, mask=full()).labels[0].split()[0] != "balanced", "a full mask leaves nothing to balance"


@pytest.mark.slow
@pytest.mark.parametrize("ulysses", [None, 2])
def test_balanced_by_name_is_exact(ulysses: int | None) -> None:
    for mask in (full(), causal(), sliding_window(9)):
        e = example((4, 2), 29, mask)
        arguments = dict(world=4, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask)
        plan_made = make_plan(29, **arguments, schedule="balanced", ulysses=ulysses)
        assert worst(simulate(plan_made, e.q, e.k, e.v, e.dout), (e.out, e.lse, *e.grads)) < EXACT


def test_a_schedule_for_one_mask_is_checked_with_it() -> None:
    arguments = dict(world=4, heads=4, head_dim=8, layout="contiguous")
    half = make_plan(32, **arguments, mask=causal(), schedule="ring").forward[0].schedule
    assert make_plan(32, **arguments, mask=causal(), schedule=half).forward[0].schedule == half
    with pytest.raises(ScheduleError):
        make_plan(32, **arguments, mask=full(), schedule=half)


def test_one_rank_degenerates() -> None:
    alone = plan(world=1)
    assert not alone.forward[0].schedule.moves and str(alone.layout) == "contiguous"
    for name in NAMES:
        assert not plan(world=1, schedule=name).backward[0].schedule.moves


def test_the_prediction_is_part_of_the_text() -> None:
    assert "predicted on nvlink: forward " in str(plan(topology="nvlink"))
    assert "predicted on infiniband: " in str(plan()), "the default topology"
    assert (
        plan(topology="cpu", schedule="bidirectional_ring").digest
        == plan(topology="nvlink", schedule="bidirectional_ring").digest
    ), "notes do not count"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_every_name_is_exact(world: int) -> None:
    for mask in (full(), causal()):
        e = example((4, 2), 29, mask)
        for name in ("mesh", "all_gather", "ring_direct", "auto"):
            plan_made = make_plan(
                29, world=world, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask, schedule=name, topology=SLOW_LINKS
            )
            actual = simulate(plan_made, e.q, e.k, e.v, e.dout)
            assert worst(actual, (e.out, e.lse, *e.grads)) < EXACT, f"{name} {mask}"
