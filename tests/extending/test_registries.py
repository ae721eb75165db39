"""Registries: one list of each kind, additions that can be taken back, and ranks that have registered different things."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from ringattn import (
    InputError,
    LaunchError,
    MismatchError,
    PlanError,
    ScheduleError,
    attention,
    comm,
    kernels,
    make_plan,
    merging,
    schedule,
    shard,
)
from ringattn.cli.train.config import TrainConfig
from ringattn.comm import P2P, Transport
from ringattn.kernels import KernelOption, Reference
from ringattn.merging import Merge, MergeRequest, windows
from ringattn.plan import KERNELS as KERNEL_NAMES
from ringattn.schedule import CatalogRequest, ring, token_ring

PAGE = Path(__file__).parents[2] / "docs/extending.md"
MODEL: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=8)
LISTS = {
    "schedules": schedule.NAMES,
    "kernels": KERNEL_NAMES,
    "merge policies": merging.POLICIES,
    "transports": comm.TRANSPORTS,
}


class One(Reference):
    name = "mine"


class Other(Reference):
    name = "mine"


def ring_variants(request: CatalogRequest) -> Iterator[Any]:
    yield "", ring(request.world)


def token_ring_variants(request: CatalogRequest) -> Iterator[Any]:
    yield "", token_ring(request.world)


def in_twos(request: MergeRequest) -> Merge:
    return windows(request.plan.seq_len, 2)


def in_threes(request: MergeRequest) -> Merge:
    return windows(request.plan.seq_len, 3)


def plain(group: dist.ProcessGroup) -> Transport:
    return P2P(group)


ADD: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
    "schedules": (lambda name: schedule.register(name, ring_variants), schedule.unregister),
    "kernels": (lambda name: kernels.register(type("Named", (Reference,), {"name": name})) and None, kernels.unregister),
    "merge policies": (lambda name: merging.register(name, in_twos), merging.unregister),
    "transports": (lambda name: comm.register(name, plain), comm.unregister),
}


@pytest.mark.parametrize("kind", ADD)
def test_what_is_added_is_listed_and_can_be_taken_back(kind: str) -> None:
    add, remove = ADD[kind]
    before = list(LISTS[kind])
    add("mine")
    try:
        assert list(LISTS[kind]) == [*before, "mine"]
        with pytest.raises(InputError, match=r"'mine' is registered already; .* unregister\('mine'\) first"):
            add("mine")
    finally:
        remove("mine")
    assert list(LISTS[kind]) == before
    with pytest.raises(InputError, match=r"registered .* names are: none"):
        remove("mine")


@pytest.mark.parametrize("kind", ADD)
def test_names_of_the_library_and_what_is_no_name_are_refused(kind: str) -> None:
    add, remove = ADD[kind]
    before = list(LISTS[kind])
    for name in before:
        with pytest.raises(InputError, match="belongs to the library; register yours under another name"):
            add(name)
        with pytest.raises(InputError, match="names are: none"):
            remove(name)
    for name in ("", "a:b", "a,b", "9", "a b", None, 3):
        with pytest.raises(InputError, match="give letters, digits"):
            add(name)  # type: ignore[arg-type]
    reserved = {"schedules": "auto balanced", "kernels": "auto emulated", "transports": "automatic", "merge policies": ""}
    for name in reserved[kind].split():
        with pytest.raises(InputError, match="belongs to the library"):
            add(name)
    assert list(LISTS[kind]) == before


def test_what_cannot_be_registered_is_refused() -> None:
    for wrong in (None, 3, object(), Reference(), kernels.Kernel, int):
        with pytest.raises(InputError, match="give a subclass of Kernel with segment_backward and segment_forward"):
            kernels.register(wrong)  # type: ignore[type-var]
    for register in (schedule.register, merging.register, comm.register):
        with pytest.raises(InputError, match=r"give a (class or )?function"):
            register("mine", 3)  # type: ignore[operator]
    assert "mine" not in {*schedule.NAMES, *merging.POLICIES, *comm.TRANSPORTS, *KERNEL_NAMES}


def test_every_kernel_has_a_class_of_its_name_and_the_same_options() -> None:
    assert list(KERNEL_NAMES) == list(kernels.KERNELS)
    for name, kernel in kernels.KERNELS.items():
        assert kernel.name == name and kernel.options == KERNEL_NAMES[name].options


def test_a_kernels_options_stand_behind_its_name() -> None:
    class WithOption(Reference):
        name = "mine"
        options: ClassVar = {"chunk": KernelOption("rows at a time", most=64)}

        def __init__(self, chunk: int = 0) -> None:
            self.chunk = chunk

    kernels.register(WithOption)
    try:
        plan = make_plan(20, world=2, kernel="mine:chunk=8", **MODEL)
        registered = kernels.get(plan.kernel)
        assert isinstance(registered, WithOption) and registered.chunk == 8
        assert plan.digest != make_plan(20, world=2, kernel="mine", **MODEL).digest
        with pytest.raises(PlanError, match=r"options of 'mine' are chunk=N \(rows at a time\)"):
            make_plan(20, world=2, kernel="mine:rows=8", **MODEL)
        with pytest.raises(PlanError, match="give chunk as a whole number"):
            make_plan(20, world=2, kernel="mine:chunk=65", **MODEL)
    finally:
        kernels.unregister("mine")
    with pytest.raises(PlanError, match="kernel='mine'; choose one of auto, sdpa"):
        make_plan(20, world=2, kernel="mine", **MODEL)


def test_a_name_that_is_registered_anew_is_not_answered_from_a_cache() -> None:
    digests = []
    for variants in (ring_variants, token_ring_variants, ring_variants):
        schedule.register("mine", variants)
        digests.append(make_plan(20, world=4, schedule="mine", **MODEL).digest)
        schedule.unregister("mine")
    assert digests[0] == digests[2] == make_plan(20, world=4, schedule=ring(4), **MODEL).digest != digests[1]
    with pytest.raises(PlanError, match="schedule='mine'; choose one of"):
        make_plan(20, world=4, schedule="mine", **MODEL)
    registered = []
    for kernel in (One, Other):
        kernels.register(kernel)
        registered.append(type(kernels.get("mine")))
        kernels.unregister("mine")
    assert registered == [One, Other]


def test_auto_considers_what_is_registered_for_it_and_nothing_else() -> None:
    asked: dict[str, Any] = dict(world=2, topology="ethernet", **MODEL)
    before = make_plan(64, **asked).digest
    for automatic in (False, True):
        calls: list[CatalogRequest] = []

        def variants(request: CatalogRequest, calls: list[CatalogRequest] = calls) -> Iterator[Any]:
            calls.append(request)
            yield "", ring(request.world)

        schedule.register("mine", variants, automatic=automatic)
        assert make_plan(64, **asked).digest == before  # no better than what is there
        schedule.unregister("mine")
        assert bool(calls) == automatic


def wrong_tiles(request: CatalogRequest) -> Iterator[Any]:
    right = ring(request.world)
    yield "", schedule.make("wrong", right.world, right.tiles[1:], right.moves, right.limits)


@pytest.mark.parametrize(
    ("variants", "error"),
    [
        (wrong_tiles, r"Q_ACC0 .* without"),
        (lambda request: iter([ring(request.world)]), "yield .words, Schedule or tuple of them."),
        (lambda request: iter([("", ring(request.world + 1))]), "is no Schedule for 2 ranks"),
        (lambda request: iter([("", ())]), "yield .words, Schedule or tuple of them."),
    ],
)
def test_a_schedule_that_is_wrong_is_refused_by_make_plan(variants: Any, error: str) -> None:
    schedule.register("mine", variants)
    try:
        with pytest.raises((PlanError, ScheduleError), match=error):
            make_plan(20, world=2, schedule="mine", **MODEL)
    finally:
        schedule.unregister("mine")


def test_a_run_can_be_asked_for_every_policy_that_is_causal() -> None:
    """The flags of `ringattn train` are written out, as its help is printed where there is no torch."""
    choices = get_args(get_type_hints(TrainConfig)["merge"])
    assert choices == ("none", *(name for name, policy in merging.POLICIES.items() if policy.causal))


# Ranks that have registered different things


def disagree(rank: int) -> dict[str, str]:
    group = dist.group.WORLD
    assert group is not None
    return {
        "kernel": _raised(lambda: _attend(kernel=_add(kernels, (One, Other)[rank]))),
        "schedule": _raised(lambda: _attend(schedule=_add(schedule, (ring_variants, token_ring_variants)[rank]))),
        "policy": _raised(lambda: _merge(_add(merging, (in_twos, in_threes)[rank]))),
        "transport": _raised(lambda: comm.choose(group, _add(comm, (plain, P2P)[rank]))),
        "kernel of one rank": _raised(lambda: _attend_with_a_kernel_of_rank_0(rank)),
        "the same": _raised(lambda: _attend(kernel=_add(kernels, One), schedule=_add(schedule, ring_variants))),
    }


def _add(package: Any, thing: Any) -> str:
    package.register(thing) if package is kernels else package.register("mine", thing)
    return "mine"


def _attend(**choices: Any) -> None:
    plan = make_plan(20, world=2, **MODEL, **choices)
    q, k, v = (shard(torch.randn(1, 20, heads, 8), plan) for heads in (4, 2, 2))
    attention(q, k, v, plan)


def _attend_with_a_kernel_of_rank_0(rank: int) -> None:
    """As if the plan had been sent by a rank that knows the kernel."""
    kernels.register(One)
    plan = make_plan(20, world=2, kernel="mine", **MODEL)
    if rank == 1:
        kernels.unregister("mine")
    q, k, v = (shard(torch.randn(1, 20, heads, 8), plan) for heads in (4, 2, 2))
    attention(q, k, v, plan)


def _merge(policy: str) -> None:
    plan = make_plan(20, world=2, schedule="ring", **MODEL)
    rows = shard(torch.randn(1, 20, 8), plan)
    numbers: dict[str, Any] = dict(factor=2, window=8, remove=0.5, threshold=None, scorer="alternate", ends=(), protect=0)
    where = torch.arange(plan.rows(dist.get_rank()))
    request = MergeRequest(rows, where[None], where, plan, None, lambda x: x, None, **numbers, seed=0, layer=0)
    merging.shorten(merging.POLICIES[policy].decide(request), plan, schedule="ring").merge(rows)


def _raised(action: Callable[[], None]) -> str:
    """What `action` raises, in words. What it has registered is gone then."""
    try:
        action()
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for package in (kernels, schedule, merging, comm):
            try:
                package.unregister("mine")
            except InputError:
                continue


@pytest.fixture(scope="module")
def registered() -> list[dict[str, str]]:
    return run_ranks(2, disagree)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("kernel", MismatchError, "One"),
        ("schedule", MismatchError, "plan"),
        ("policy", MismatchError, "merge"),
        ("transport", LaunchError, "ranks disagree on transport"),
        ("kernel of one rank", InputError, "kernel='mine'; choose one of auto, sdpa"),
    ],
)
def test_every_rank_hears_of_what_differs(registered: list[dict[str, str]], case: str, error: type, words: str) -> None:
    for rank in registered:
        assert rank[case].startswith(error.__name__) and words in rank[case], rank[case]


def test_ranks_that_register_the_same_get_along(registered: list[dict[str, str]]) -> None:
    assert {rank["the same"] for rank in registered} == {"nothing"}


# Pages


@pytest.mark.parametrize("kind", LISTS)
def test_the_page_lists_what_the_registry_has(kind: str) -> None:
    text = PAGE.read_text()
    rows = itertools.takewhile(lambda line: line.startswith("|"), text.split(f"| {kind} |")[1].splitlines()[2:])
    listed = dict(re.fullmatch(r"\| `(\S+)` \| (.*) \|", row).groups() for row in rows)  # type: ignore[union-attr,misc]
    assert listed == {name: entry.summary for name, entry in LISTS[kind].items()}  # type: ignore[attr-defined]
