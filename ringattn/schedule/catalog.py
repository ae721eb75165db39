"""Lists schedules by name, each with the variants among which the planner chooses by price.

`NAMES` lists them with a summary of each; `register` adds one. Each of them also runs inside Ulysses, in which groups of ranks
exchange sequence for heads (see `schedule.ulysses`); the name is then that of the schedule among the groups.

`balanced` is built for a mask and a layout, so it is not here: see `planner.solver` and the planner.

Blocks may be cut into parts that travel separately: halves, of which a mask may leave one unread; quarters, so that the first
tile starts and the first result leaves early; or trimmed to the rows that another rank needs (see `head_groups.trim`).
Within a name and among names, schedules with smaller buffers come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isqrt

from ringattn._validation import Registry, count, flag, short_repr, text
from ringattn.errors import InputError, PlanError
from ringattn.schedule.check import check
from ringattn.schedule.interleave import take_turns
from ringattn.schedule.ir import Schedule
from ringattn.schedule.mesh import factors, mesh
from ringattn.schedule.ring import bidirectional_ring, ring
from ringattn.schedule.token_ring import accumulating_ring, token_ring
from ringattn.schedule.transforms import both_ways, divide, split
from ringattn.schedule.ulysses import ulysses

TRIMMED = 3  # parts: the rows that others need, and those before and after them
IN_FLIGHT = 4  # peers that a direct schedule sends to at once

HeadGroups = tuple[Schedule, ...]
Variants = Iterator[tuple[str, HeadGroups]]


@dataclass(frozen=True)
class CatalogEntry:
    """A schedule that has a name.

    variants: see `register`.
    summary: what it does, in one line.
    automatic: whether "auto" considers it, where there are `least_ranks` or more.
    """

    variants: Callable[[CatalogRequest], Variants]
    summary: str
    automatic: bool = True
    least_ranks: int = 1


@dataclass(frozen=True)
class Named:
    """One variant of a named schedule."""

    name: str
    variant: str
    head_groups: HeadGroups
    trimmed: bool = False  # cut its blocks where a layout has rows that no other rank needs

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


@dataclass(frozen=True)
class CatalogRequest:
    """What the choice of variants depends on. `node_size` is 1 where ranks are not grouped in nodes."""

    world: int
    heads: int
    kv_heads: int
    node_size: int = 1
    directions: tuple[int, ...] = (1, -1)
    parts: tuple[int, ...] = (1,)
    trimmed: tuple[str, ...] = ()  # "q", "kv": of which a layout has rows that no other rank needs

    def inside(self, degree: int) -> CatalogRequest:
        """What is left to a schedule that runs inside Ulysses of `degree`."""
        node = self.node_size // degree if self.node_size % degree == 0 else 1
        of_one = max(1, self.heads // degree), max(1, self.kv_heads // degree)
        narrowed = replace(self, directions=self.directions[-1:], parts=self.parts[-1:])  # those that move least in most cases
        return replace(narrowed, world=self.world // degree, heads=of_one[0], kv_heads=of_one[1], node_size=node)


def named(name: str, request: CatalogRequest, degree: int = 1) -> Iterator[Named]:
    """The variants of `name`, one of `NAMES`, inside Ulysses of `degree`."""
    if degree == 1:
        for variant, schedules, trimmed in _and_trimmed(_variants(name, request), request):
            yield Named(name, variant, schedules, trimmed)
        return
    inside = request.inside(degree)
    groups = [n for n in (1, 2, 4) if request.kv_heads % (degree * n) == 0] or [1]
    if inside.world == 1:
        for n in groups:
            for parts in (1, 2, 4):
                exchange = split(ring(1), q=parts) if parts > 1 else ring(1)
                yield Named(f"ulysses {degree}", _words("", parts, n), ulysses(exchange, degree, groups=n))
            yield Named(f"ulysses {degree}", _words("in stages", 1, n), ulysses(ring(1), degree, stages=degree - 1, groups=n))
        return
    for variant, schedules, trimmed in _and_trimmed(_variants(name, inside), inside):
        for n in groups if request.kv_heads >= degree * len(schedules) else [1]:
            wrapped = zip(*(ulysses(schedule, degree, stages=degree - 1, groups=n) for schedule in schedules), strict=True)
            interleaved = tuple(schedule for member in wrapped for schedule in member)
            yield Named(name, _words(f"ulysses {degree}, {variant}", 1, n), interleaved, trimmed)


def _variants(name: str, request: CatalogRequest) -> Variants:
    entry = NAMES[name]
    return entry.variants(request) if name in NAMES.built_in else _checked(entry, name, request)


def _and_trimmed(variants: Variants, request: CatalogRequest) -> Iterator[tuple[str, HeadGroups, bool]]:
    """Each as it is, and if its blocks are whole and some of what travels is not needed, without that."""
    for variant, schedules in variants:
        yield variant, schedules, False
        moving = {"q" if move.kind.of_queries else "kv" for schedule in schedules for move in schedule.moves} & set(
            request.trimmed
        )
        if moving and all(len(schedule.q_owner) == len(schedule.kv_owner) == schedule.world for schedule in schedules):
            divided = tuple(divide(schedule, **dict.fromkeys(moving, TRIMMED)) for schedule in schedules)
            yield ", ".join(filter(None, (variant, "trimmed"))), divided, True


def _words(variant: str, parts: int, groups: int) -> str:
    words = [variant, f"{parts} parts" if parts > 1 else "", f"{groups} groups" if groups > 1 else ""]
    return ", ".join(filter(None, words))


def _ring(request: CatalogRequest) -> Variants:
    for direction in request.directions:
        yield from _cut("kv", request, "hop", direction, ring(request.world, direction=direction))


def _bidirectional_ring(request: CatalogRequest) -> Variants:
    yield "hop", bidirectional_ring(request.world)


def _ring_direct(request: CatalogRequest) -> Variants:
    ahead = max(1, min(IN_FLIGHT, request.world - 1))
    for direction in request.directions:
        schedule = ring(request.world, routing="direct", direction=direction, lookahead=ahead)
        yield from _cut("kv", request, "direct", direction, schedule)


def _token_ring(request: CatalogRequest) -> Variants:
    for routing in ("hop", "direct"):
        for direction in request.directions:
            yield from _cut("q", request, routing, direction, token_ring(request.world, routing=routing, direction=direction))
    if request.heads > 1:
        yield "hop, both ways", both_ways(token_ring(request.world))


def _accumulating_ring(request: CatalogRequest) -> Variants:
    for direction in request.directions:
        yield from _cut("q", request, "hop", direction, accumulating_ring(request.world, direction=direction))


def _mesh(request: CatalogRequest) -> Variants:
    """The squarest grid, those that move least in either pass, and one with nodes as rows."""
    world, q, kv = request.world, request.heads, request.kv_heads
    grids = {max(factors(world, upto=isqrt(world))), request.node_size}
    # Vectors that move for each row of a visitor: q and out, k and v; then q, dout and dq, k, v, dk and dv.
    for of_q, of_kv in ((2 * q, 2 * kv), (3 * q, 4 * kv)):
        grids.add(min(factors(world, upto=world), key=lambda a: (a - 1) * of_q + (world // a - 1) * of_kv))
    for a in sorted(grids):
        if world % a == 0:
            yield f"{a} x {world // a}", (mesh(world, a=a),)
            if world > 2:
                yield f"{a} x {world // a}, direct", (mesh(world, a=a, q_routing="direct", kv_routing="direct"),)


def _all_gather(request: CatalogRequest) -> Variants:
    schedule = ring(request.world, routing="direct", lookahead=max(1, request.world - 1))
    yield "", (replace(schedule, name="all_gather"),)


def _cut(kind: str, request: CatalogRequest, routing: str, direction: int, schedule: Schedule) -> Variants:
    cut, words = take_turns if routing == "direct" else split, routing + ", reversed" * (direction == -1)
    for parts in request.parts:
        yield _words(words, parts, 1), (schedule if parts == 1 else cut(schedule, **{kind: parts}),)


NAMES: Registry[CatalogEntry] = Registry(
    "schedule",
    {
        "ring": CatalogEntry(_ring, "KV from neighbour to neighbour, in either direction"),
        "bidirectional_ring": CatalogEntry(_bidirectional_ring, "half of the heads in each direction"),
        "ring_direct": CatalogEntry(_ring_direct, "KV from its owner straight to each rank, a few at a time", least_ranks=3),
        "token_ring": CatalogEntry(
            _token_ring, "Q to neighbours or straight to each rank, partial results straight to the owner"
        ),
        "accumulating_ring": CatalogEntry(_accumulating_ring, "Q to neighbours, followed by one result that accumulates"),
        "mesh": CatalogEntry(_mesh, "Q along rows, KV along columns, by hop or direct; a few suitable grids", least_ranks=3),
        "all_gather": CatalogEntry(
            _all_gather, "KV to all ranks at once, in buffers as large as the sequence", automatic=False
        ),
    },
    reserved=("auto", "balanced", "given"),
)


def register(
    name: str,
    variants: Callable[[CatalogRequest], Variants],
    *,
    summary: str = "",
    automatic: bool = False,
    least_ranks: int = 1,
) -> None:
    """Lets `make_plan(schedule=name)` choose among the schedules that `variants` yields. Call it on every rank alike.

    Every schedule is proved by `check` before it is used. Its text is part of a plan's digest, so ranks whose `variants` differ
    raise `MismatchError` at the first call instead of waiting for each other.

    Args:
        name: letters, digits, _ and -.
        variants: for a `CatalogRequest`, yields pairs of a text that distinguishes variants, and the schedules: one that
            computes all heads, or several that divide them. It may yield none for a number of ranks that it does not
            support, and must depend on nothing but the request.
        summary: what it does, for lists.
        automatic: whether schedule="auto" considers it too.
        least_ranks: with fewer, "auto" leaves it out.

    Raises:
        InputError: the name exists already or is not valid; `variants` is not a function.
    """
    if not callable(variants):
        raise InputError(f"variants={short_repr(variants)}; give a function of a CatalogRequest that yields (words, schedules)")
    text("summary", summary, InputError)
    flag("automatic", automatic, InputError)
    NAMES.register(name, CatalogEntry(variants, summary, automatic, count("least_ranks", least_ranks, InputError)))


def unregister(name: str) -> None:
    """Removes a registered schedule. Plans made with it stay as they are. Raises `InputError` if there is none."""
    NAMES.unregister(name)


def automatic_names(ranks: int) -> list[str]:
    """The names that "auto" considers on `ranks` ranks. With one rank all schedules are equal."""
    return ["ring"] if ranks == 1 else [name for name, e in NAMES.items() if e.automatic and ranks >= e.least_ranks]


def _checked(entry: CatalogEntry, name: str, request: CatalogRequest) -> Variants:
    """The variants of a schedule that was registered, each proved; those of the library are proved by its tests."""
    for variant in entry.variants(request):
        words, schedules = variant if isinstance(variant, tuple) and len(variant) == 2 else (None, ())
        schedules = (schedules,) if isinstance(schedules, Schedule) else schedules
        if not isinstance(words, str) or not isinstance(schedules, tuple) or not schedules:
            raise PlanError(
                f"schedule {name!r}: its variants gave {short_repr(variant)}; yield (words, Schedule or tuple of them)"
            )
        for schedule in schedules:
            if not isinstance(schedule, Schedule) or schedule.world != request.world:
                raise PlanError(
                    f"schedule {name!r}: {short_repr(schedule)} is no Schedule for {request.world} ranks; build it for those"
                )
            check(schedule)
        yield words, schedules
