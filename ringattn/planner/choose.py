"""Choose by price. Nobody's slogan decides.

Every schedule and layout that the request allows is a candidate, forward and backward each by itself; both share the layout.
They are looked at in the order of the bytes they move, and a later one takes over only if it is more than 1 % faster, which is
less than the model can tell apart: where compute hides the transfers, the fewest bytes win. Equal bytes: the order of
`schedule.named`. Layouts stand in the order contiguous, zigzag, striped, and a later one must gain 5 %: it breaks tiles into
other shapes, and what kernels make of those is not modelled. One that shares a ring's work out no better than one before it has
nothing to gain by.

What cannot take over, because its compute or its busiest link alone takes too long, is not simulated. Plans are priced for a
batch of 1: with more, compute and bytes grow alike, and only latency counts for less. All of it is arithmetic on integers and
IEEE doubles and depends on the request alone, so every rank finds the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ringattn.cost import BACKWARD_FLOPS, Cost, compute_seconds, price, traffic, transfer_seconds
from ringattn.errors import PlanError
from ringattn.layout import Layout
from ringattn.mask import full
from ringattn.plan import Plan, make_lanes
from ringattn.planner.request import Request
from ringattn.planner.share_out import shared_out
from ringattn.schedule import check, ring, split
from ringattn.schedule.named import NAMES, Facts, Named, named
from ringattn.topology import Topology

TIE = 1.01
WORTH_A_SEARCH = 0.05  # of the time, that ranks would wait for transfers
SMALL = 8  # up to as many ranks "auto" searches for a balanced schedule: a second or two; by name it does for any number
LARGE = 16  # more ranks than this are planned in whole blocks: parts gain little there and take long to price
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

    @property
    def buffer_bytes(self) -> int:
        """The most that a rank holds beyond its own rows, in either pass."""
        return max(self.cost(backward=backward).buffer_bytes for backward in (False, True))

    def total_bytes(self, *, backward: bool) -> int:
        return sum(self._traffic[backward].values())

    def compute(self, *, backward: bool) -> float:
        """Seconds of the rank that computes most."""
        return self._compute * (BACKWARD_FLOPS if backward else 1)

    @cached_property
    def _compute(self) -> float:
        return compute_seconds(self.plan, self.topology)

    def at_least(self, *, backward: bool) -> float:
        """Seconds it cannot take less than, without a simulation."""
        return max(self.compute(backward=backward), transfer_seconds(self._traffic[backward], self.topology))

    @cached_property
    def _traffic(self) -> tuple[dict[tuple[int, int], int], ...]:
        return tuple(traffic(self.plan, backward=backward) for backward in (False, True))

    @cached_property
    def _costs(self) -> dict[bool, Cost]:
        return {}


Pair = tuple[Candidate, Candidate]  # forward, backward


@lru_cache(maxsize=256)
def choose(request: Request) -> Plan:
    """The plan for `request`, the same object for an equal request."""
    (forward, backward), _ = _decide(request)
    told = _told("forward", forward.cost(backward=False)), _told("backward", backward.cost(backward=True))
    notes = f"predicted on {request.topology.name}: {'; '.join(told)}"
    labels = str(forward.named), str(backward.named)
    lanes = forward.plan.forward if forward is backward else backward.plan.backward
    return replace(forward.plan, backward=lanes, labels=labels, notes=notes)


@lru_cache(maxsize=256)
def _decide(request: Request) -> tuple[Pair, Sequence[Candidate]]:
    """The two candidates of the plan, and what was searched for besides those that have names."""
    best: tuple[int, Pair] | None = None
    for n, layout in reversed(list(enumerate(_worthwhile(request)))):
        limit = float("inf") if best is None else LAYOUT_TIE * _seconds(*best[1])
        found = options(request, layout, limit)
        if found and min(_least(option, option) for option in found) < limit:
            pair = _best_pair(found)
            best = (n, pair) if best is None or _seconds(*pair) < limit else best
    if best is None:
        free = request._replace(buffer_limit=None)
        least = min(option.buffer_bytes for layout in _worthwhile(free) for option in options(free, layout))
        raise PlanError(f"buffer_limit={request.buffer_limit}: the least that any allowed plan needs is {least} bytes")
    return _shared_out(request, *best)


def _shared_out(request: Request, at: int, best: Pair) -> tuple[Pair, Sequence[Candidate]]:
    """The same, or better with schedules made for this very mask: worth a search where compute does not hide all transfers."""
    searched: list[Candidate] = []
    if request.schedule != "auto" or request.world > SMALL or request.mask == full():
        return best, searched
    for n, layout in enumerate(_worthwhile(request)):
        idle = _seconds(*best) - best[0].compute(backward=False) - best[1].compute(backward=True)
        if idle < WORTH_A_SEARCH * _seconds(*best):
            break
        degrees = [degree for degree in request.degrees if request.world // degree > 2]
        found = _candidates(request, layout, (one for degree in degrees for one in shared_out(request, layout, degree)))
        searched += found
        pair = _best_pair([*found, *(best if n == at else ())]) if found else best
        if TIE * _seconds(*pair) < _seconds(*best):
            at, best = n, pair
    return best, searched


def _best_pair(found: Sequence[Candidate]) -> Pair:
    """The cheapest of each pass. One whose inputs rest away from home counts on both passes being its own."""
    free = [option for option in found if not option.plan.keep]
    pairs = [(option, option) for option in found if option.plan.keep]
    if free:
        pairs.append((_cheapest(free, backward=False), _cheapest(free, backward=True)))
    best, *others = sorted(pairs, key=lambda pair: pair[0].total_bytes(backward=False) + pair[1].total_bytes(backward=True))
    for pair in others:
        if TIE * _least(*pair) < _seconds(*best) and TIE * _seconds(*pair) < _seconds(*best):
            best = pair
    return best


def _cheapest(found: Sequence[Candidate], *, backward: bool) -> Candidate:
    first, *others = sorted(found, key=lambda option: option.total_bytes(backward=backward))
    best, seconds = first, first.cost(backward=backward).seconds
    for option in others:
        if TIE * option.at_least(backward=backward) < seconds and TIE * option.cost(backward=backward).seconds < seconds:
            best, seconds = option, option.cost(backward=backward).seconds
    return best


def _seconds(forward: Candidate, backward: Candidate) -> float:
    return forward.cost(backward=False).seconds + backward.cost(backward=True).seconds


def _least(forward: Candidate, backward: Candidate) -> float:
    """What no simulation can find less than."""
    return forward.at_least(backward=False) + backward.at_least(backward=True)


def _told(which: str, cost: Cost) -> str:
    return f"{which} {cost.seconds * 1e3:.3g} ms, {cost.link_bytes / 1e6:.3g} MB on the busiest link"


def allowed(request: Request) -> list[Candidate]:
    """All that `choose` has chosen from: what has a name, and what it searched for."""
    named = [option for layout in _worthwhile(request) for option in options(request, layout)]
    return [*named, *_decide(request)[1]] if named else named


def options(request: Request, layout: Layout, limit: float = float("inf")) -> list[Candidate]:
    """Every schedule that `request` allows, on one layout; not those whose compute alone takes more than `limit` seconds."""
    found = _candidates(request, layout, _schedules(request, layout))
    return [one for one in found if sum(one.compute(backward=backward) for backward in (False, True)) < limit]


def _candidates(request: Request, layout: Layout, named: Iterable[Named]) -> list[Candidate]:
    found = []
    for one in named:
        lanes = make_lanes(one.lanes, layout, request.mask, request.heads, request.kv_heads)
        model = (request.heads, request.kv_heads, request.head_dim, request.dtype)
        plan = Plan(request.seq_len, request.world, *model, request.mask, layout, request.kernel, lanes, lanes)
        found.append(Candidate(one, plan, request.topology))
    limit = request.buffer_limit
    return found if limit is None else [option for option in found if option.buffer_bytes <= limit]


def _worthwhile(request: Request) -> list[Layout]:
    """The layouts, without those on which a ring's work is no more even than on one before."""
    found: list[tuple[int, Layout]] = []
    for layout in request.layouts:
        (lane,) = make_lanes((ring(request.world),), layout, request.mask, request.heads, request.kv_heads)
        work = [0] * request.world
        for (i, _), area in lane.areas.items():
            work[i] += area
        if not any(busiest < LAYOUT_TIE * max(work) for busiest, _ in found):
            found.append((max(work), layout))
    return [layout for _, layout in found]


def _schedules(request: Request, layout: Layout) -> Iterator[Named]:
    if not isinstance(request.schedule, str):
        for lane in make_lanes(request.schedule, layout, request.mask, request.heads, request.kv_heads):
            check(lane.schedule, lane.areas)
        yield Named("given", "", request.schedule)
        return
    if request.schedule == "balanced":
        yield from shared_out(request, layout, request.degrees[0])
        return
    for degree in request.degrees:
        groups = request.world // degree
        for name in _different(groups) if request.schedule == "auto" else [request.schedule]:
            yield from _variants(name, _facts(request, layout), degree)


def _different(ranks: int) -> list[str]:
    """Names that differ on so few ranks. all_gather is left out: its buffers grow with the whole sequence."""
    if ranks == 1:
        return ["ring"]
    return [name for name in NAMES if name != "all_gather" and (ranks > 2 or name not in ("ring_direct", "mesh"))]


def _facts(request: Request, layout: Layout) -> Facts:
    """Where every tile has work and links are alike, a schedule turned round costs the same, and no part of a block is idle."""
    world = request.world
    (whole,) = make_lanes((ring(world),), layout, request.mask, request.heads, request.kv_heads)
    (halves,) = make_lanes((split(ring(world), q=2, kv=2),), layout, request.mask, request.heads, request.kv_heads)
    idle = len(halves.areas) < (2 * world) ** 2
    directions = (1, -1) if idle or len(whole.areas) < world**2 or request.topology.kind == "matrix" else (1,)
    parts = (1,) if world > LARGE else (1, 2) if idle else (1, 4)
    return Facts(world, request.heads, request.kv_heads, request.topology.node_size or 1, directions, parts)


@lru_cache(maxsize=64)
def _variants(name: str, facts: Facts, degree: int) -> tuple[Named, ...]:
    return tuple(named(name, facts, degree))
