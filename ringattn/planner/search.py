"""Chooses schedules and layouts by price.

Every schedule and layout that the request allows is a candidate, separately for forward and backward; both share the layout.
For inference only forward counts.

Candidates are compared in order of the bytes they move. A later one replaces an earlier one only if it is more than 1 % faster,
which is less than the model can distinguish: where compute hides the transfers, the fewest bytes win. With equal bytes the
order of `schedule.catalog` decides. Layouts come in the order contiguous, zigzag, striped (packed documents: contiguous,
documents, zigzag); a later one must gain 5 %, because it breaks tiles into other shapes, whose effect on kernels is not
modelled. A layout that balances a ring no better than an earlier one is skipped.

Candidates whose compute or busiest link alone takes too long are not simulated. Plans are priced for a batch of 1: with more,
compute and bytes grow equally, and only latency counts for less. All arithmetic is on integers and IEEE doubles and depends on
the request alone, so every rank gets the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ringattn.errors import PlanError
from ringattn.plan.head_groups import EVENLY, make_head_groups, pairs, trim
from ringattn.plan.plan import Plan
from ringattn.planner.cost import BACKWARD_FLOPS, Cost, compute_seconds, price, traffic, transfer_seconds
from ringattn.planner.request import Request
from ringattn.planner.solved import balanced_candidates
from ringattn.planner.topology import Topology
from ringattn.schedule import check, ring, split
from ringattn.schedule.catalog import NAMES, CatalogEntry, CatalogRequest, Named, automatic_names, named
from ringattn.schedule.ir import MOST_RANKS
from ringattn.sequence.layout import Layout
from ringattn.sequence.mask import full

TIE = 1.01
MIN_IDLE_SHARE = 0.05  # of the time; if ranks wait less than this for transfers, no search is made
SMALL = 8  # up to this many ranks "auto" searches for a balanced schedule, in a second or two; "balanced" does for any number
LARGE = 16  # for more ranks than this blocks are not cut into parts: these gain little and take long to price
LAYOUT_TIE = 1.05


@dataclass(frozen=True, eq=False)
class Candidate:
    """One schedule on one layout, for both passes, and what it costs."""

    named: Named
    plan: Plan
    topology: Topology

    def cost(self, *, backward: bool) -> Cost:
        if backward not in self._costs:
            self._costs[backward] = price(self.plan, self.topology, backward=backward)
        return self._costs[backward]

    def buffer_bytes(self, passes: Iterable[bool]) -> int:
        """The most bytes that a rank holds beyond its own rows, in any of `passes`."""
        return max(self.cost(backward=backward).buffer_bytes for backward in passes)

    def total_bytes(self, *, backward: bool) -> int:
        return sum(self._traffic[backward].values())

    def compute(self, *, backward: bool) -> float:
        """Compute seconds of the busiest rank."""
        return self._compute * (BACKWARD_FLOPS if backward else 1)

    @cached_property
    def _compute(self) -> float:
        return compute_seconds(self.plan, self.topology)

    def lower_bound(self, *, backward: bool) -> float:
        """A lower bound of its seconds, without a simulation."""
        return max(self.compute(backward=backward), transfer_seconds(self._traffic[backward], self.topology))

    @cached_property
    def _traffic(self) -> tuple[dict[tuple[int, int], int], ...]:
        return tuple(traffic(self.plan, backward=backward) for backward in (False, True))

    @cached_property
    def _costs(self) -> dict[bool, Cost]:
        return {}


Chosen = tuple[Candidate, ...]  # for forward, and in training for backward


@lru_cache(maxsize=256)
def choose(request: Request) -> Plan:
    """The plan for `request`, the same object for an equal request."""
    if request.world > MOST_RANKS:
        raise PlanError(
            f"world={request.world:,}; plans are made for {MOST_RANKS:,} ranks at most; "
            "ringattn.planner.rank_families prices more"
        )
    chosen, _ = _decide(request)
    forward, backward = chosen[0], chosen[-1]
    notes = f"predicted on {request.topology.name}: {'; '.join(map(_prediction, request.passes, chosen))}"
    labels = str(forward.named), str(backward.named)
    head_groups = forward.plan.forward if forward is backward else backward.plan.backward
    return replace(forward.plan, backward=head_groups, labels=labels, notes=notes)


@lru_cache(maxsize=256)
def _decide(request: Request) -> tuple[Chosen, Sequence[Candidate]]:
    """The candidates of the plan, and the balanced ones that a search added."""
    best: tuple[int, Chosen] | None = None
    for n, layout in reversed(list(enumerate(_useful_layouts(request)))):
        limit = float("inf") if best is None else LAYOUT_TIE * _seconds(best[1])
        candidates = options(request, layout, limit)
        if candidates and min(_lower_bound_of((option,) * len(request.passes)) for option in candidates) < limit:
            chosen = _best(candidates, request.passes)
            best = (n, chosen) if best is None or _seconds(chosen) < limit else best
    if best is None:
        free = request._replace(buffer_limit=None)
        feasible = [option for layout in _useful_layouts(free) for option in options(free, layout)]
        least = min(option.buffer_bytes(request.passes) for option in feasible)
        raise PlanError(f"buffer_limit={request.buffer_limit}: the least that any allowed plan needs is {least} bytes")
    return _with_balanced(request, *best)


def _with_balanced(request: Request, at: int, best: Chosen) -> tuple[Chosen, Sequence[Candidate]]:
    """`best`, or better schedules built for this mask; a search is made only where compute does not hide all transfers."""
    searched: list[Candidate] = []
    if request.schedule != "auto" or request.world > SMALL or request.mask == full():
        return best, searched
    for n, layout in enumerate(_useful_layouts(request)):
        idle = _seconds(best) - _sum(best, Candidate.compute)
        if idle < MIN_IDLE_SHARE * _seconds(best):
            break
        degrees = [degree for degree in request.degrees if request.world // degree > 2]
        balanced = (named for degree in degrees for named in balanced_candidates(request, layout, degree))
        candidates = _candidates(request, layout, balanced)
        searched += candidates
        chosen = _best([*candidates, *(best if n == at else ())], request.passes) if candidates else best
        if TIE * _seconds(chosen) < _seconds(best):
            at, best = n, chosen
    return best, searched


def _best(candidates: Sequence[Candidate], passes: tuple[bool, ...]) -> Chosen:
    """The cheapest of each pass. A candidate that reuses inputs from forward must be chosen for all passes."""
    free = [option for option in candidates if not option.plan.reuse_inputs]
    choices = [(option,) * len(passes) for option in candidates if option.plan.reuse_inputs]
    if free:
        choices.append(tuple(_cheapest(free, backward=backward) for backward in passes))
    best, *others = sorted(choices, key=lambda chosen: _sum(chosen, Candidate.total_bytes))
    for chosen in others:
        if TIE * _lower_bound_of(chosen) < _seconds(best) and TIE * _seconds(chosen) < _seconds(best):
            best = chosen
    return best


def _cheapest(candidates: Sequence[Candidate], *, backward: bool) -> Candidate:
    first, *others = sorted(candidates, key=lambda option: option.total_bytes(backward=backward))
    best, seconds = first, first.cost(backward=backward).seconds
    for option in others:
        if TIE * option.lower_bound(backward=backward) < seconds and TIE * option.cost(backward=backward).seconds < seconds:
            best, seconds = option, option.cost(backward=backward).seconds
    return best


def _sum(chosen: Chosen, of: Callable[..., float]) -> float:
    """The sum of `of` over all passes, each for its candidate."""
    return sum(of(option, backward=bool(n)) for n, option in enumerate(chosen))


def _seconds(chosen: Chosen) -> float:
    return _sum(chosen, lambda option, *, backward: option.cost(backward=backward).seconds)


def _lower_bound_of(chosen: Chosen) -> float:
    """A lower bound of `_seconds`, without a simulation."""
    return _sum(chosen, Candidate.lower_bound)


def _prediction(backward: bool, option: Candidate) -> str:
    cost = option.cost(backward=backward)
    name = "backward" if backward else "forward"
    return f"{name} {cost.seconds * 1e3:.3g} ms, {cost.link_bytes / 1e6:.3g} MB on the busiest link"


def all_candidates(request: Request) -> list[Candidate]:
    """All candidates of `choose`: those with names, and those that a search added."""
    named = [option for layout in _useful_layouts(request) for option in options(request, layout)]
    return [*named, *_decide(request)[1]] if named else named


def options(request: Request, layout: Layout, limit: float = float("inf")) -> list[Candidate]:
    """Every schedule that `request` allows, on one layout, except those whose compute alone takes `limit` seconds or more."""
    candidates = _candidates(request, layout, _schedules(request, layout))
    return [c for c in candidates if sum(c.compute(backward=backward) for backward in request.passes) < limit]


def _candidates(request: Request, layout: Layout, schedules: Iterable[Named]) -> list[Candidate]:
    candidates = []
    for schedule in schedules:
        cuts = trim(layout, request.mask) if schedule.trimmed else EVENLY
        head_groups = make_head_groups(schedule.head_groups, layout, request.mask, request.heads, request.kv_heads, cuts)
        model = (request.heads, request.kv_heads, request.head_dim, request.dtype)
        kernel, partials = request.kernel, request.partials
        plan = Plan(request.seq_len, request.world, *model, request.mask, layout, kernel, head_groups, head_groups, partials)
        candidates.append(Candidate(schedule, plan, request.topology))
    limit = request.buffer_limit
    return candidates if limit is None else [option for option in candidates if option.buffer_bytes(request.passes) <= limit]


@lru_cache(maxsize=64)
def _useful_layouts(request: Request) -> list[Layout]:
    """The layouts, without those that balance a ring no better than an earlier one."""
    layouts: list[tuple[int, Layout]] = []
    for layout in request.layouts:
        (head_group,) = make_head_groups((ring(request.world),), layout, request.mask, request.heads, request.kv_heads)
        most = max(pairs([head_group]).values())
        if not any(busiest < LAYOUT_TIE * most for busiest, _ in layouts):
            layouts.append((most, layout))
    return [layout for _, layout in layouts]


def _schedules(request: Request, layout: Layout) -> Iterator[Named]:
    if not isinstance(request.schedule, str):
        for head_group in make_head_groups(request.schedule, layout, request.mask, request.heads, request.kv_heads):
            check(head_group.schedule, head_group.areas)
        yield Named("given", "", request.schedule)
        return
    if request.schedule == "balanced":
        yield from balanced_candidates(request, layout, request.degrees[0])
        return
    catalog_request = _catalog_request(request, layout)
    for degree in request.degrees:
        ranks = request.world // degree
        for name in automatic_names(ranks) if request.schedule == "auto" else [request.schedule]:
            variants = _variants(name, NAMES[name], catalog_request, degree)
            if not variants and request.schedule != "auto":
                raise PlanError(f"schedule={name!r} has no variant for {ranks} ranks; choose another, or other ranks")
            yield from variants


def _catalog_request(request: Request, layout: Layout) -> CatalogRequest:
    """The request to the catalog. If all tiles have work on equal links, reversing or halving gains nothing."""
    world = request.world
    (blocks,) = make_head_groups((ring(world),), layout, request.mask, request.heads, request.kv_heads)
    (halves,) = make_head_groups((split(ring(world), q=2, kv=2),), layout, request.mask, request.heads, request.kv_heads)
    idle = len(halves.areas) < (2 * world) ** 2
    directions = (1, -1) if idle or len(blocks.areas) < world**2 or request.topology.kind == "matrix" else (1,)
    parts = (1,) if world > LARGE else (1, 2) if idle else (1, 4)
    node_size = request.topology.node_size or 1
    trimmed = tuple(kind for kind, cuts in zip(("q", "kv"), trim(layout, request.mask), strict=True) if cuts)
    return CatalogRequest(world, request.heads, request.kv_heads, node_size, directions, parts, trimmed)


@lru_cache(maxsize=64)
def _variants(name: str, entry: CatalogEntry, request: CatalogRequest, degree: int) -> tuple[Named, ...]:
    """`entry` is a cache key: a name may be registered again with another entry."""
    return tuple(named(name, request, degree))
