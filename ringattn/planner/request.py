"""Checks the arguments of `make_plan` and brings them into one form, before anything is computed.

Each error names the argument, what was found, and how to fix it. "auto" is not decided here, but by `choose`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from ringattn._validation import as_int, count, flag, instance, one_of, short_repr, text
from ringattn.errors import PlanError
from ringattn.plan.kernel_names import AUTO as AUTO_KERNEL
from ringattn.plan.kernel_names import EMULATED as EMULATED_NAME
from ringattn.plan.kernel_names import parse
from ringattn.planner.cost import ITEMSIZE
from ringattn.planner.topology import PRESETS, Topology
from ringattn.schedule import Schedule, check
from ringattn.schedule.catalog import NAMES, HeadGroups
from ringattn.schedule.mesh import factors
from ringattn.schedule.ulysses import ulysses
from ringattn.sequence.document_layout import by_documents
from ringattn.sequence.layout import LAYOUTS, Layout
from ringattn.sequence.mask import Mask, causal, full

EMULATED = f"{EMULATED_NAME}:"  # followed by the flop/s, see `kernels.emulated`
PARTIALS = ("auto", "wide", "narrow")
DEFAULT_TOPOLOGY = "infiniband"
MOST_RANKS = 1 << 20  # for closed forms; plans have a lower limit, see `choose`


class Request(NamedTuple):
    """The checked arguments of a plan, by which it is cached.

    `layouts` and `degrees` (of Ulysses) are those to choose from; `schedule` is "auto", a name, or schedules as data.
    """

    seq_len: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    mask: Mask
    schedule: str | HeadGroups
    degrees: tuple[int, ...]
    layouts: tuple[Layout, ...]
    kernel: str
    topology: Topology
    buffer_limit: int | None
    passes: tuple[bool, ...]  # the passes that count: forward (False), and in training backward (True)
    partials: str
    catalog: int  # how often `NAMES` has changed: a plan by a name that then meant something else is not found again


def request(
    *,
    seq_len: Any,
    world: Any,
    heads: Any,
    kv_heads: Any = None,
    head_dim: Any,
    dtype: Any = "float32",
    mask: Any = causal(),  # noqa: B008  (immutable)
    schedule: Any = "auto",
    layout: Any = "auto",
    ulysses: Any = None,
    kernel: Any = "auto",
    topology: Any = None,
    buffer_limit: Any = None,
    training: Any = True,
    kv_len: Any = None,
    q_offset: Any = None,
    partials: Any = "auto",
) -> Request:
    """The arguments of `make_plan` as a `Request`; raises `PlanError` for the first that is invalid."""
    seq_len, world, heads = count("seq_len", seq_len, PlanError), _world(world), count("heads", heads, PlanError)
    kv_heads = heads if kv_heads is None else count("kv_heads", kv_heads, PlanError)
    if heads % kv_heads:
        raise PlanError(f"heads={heads} is not a multiple of kv_heads={kv_heads}; pass the numbers of heads of the model")
    degrees = _degrees(ulysses, world, heads, schedule)
    kernel, topology = _kernel(kernel), topology_for(topology, world)
    if kernel.startswith(EMULATED):
        topology = replace(topology, flops=float(kernel.removeprefix(EMULATED)))
    mask = _mask(mask)
    return Request(
        seq_len,
        world,
        heads,
        kv_heads,
        count("head_dim", head_dim, PlanError),
        one_of("dtype", _dtype(dtype), ITEMSIZE, PlanError),
        mask,
        _schedule(schedule, world, heads, degrees[0]),
        degrees,
        _layouts(layout, seq_len, world, mask, kv_len, q_offset),
        kernel,
        topology,
        None if buffer_limit is None else count("buffer_limit", buffer_limit, PlanError),
        (False, True)[: 1 + flag("training", training, PlanError)],
        one_of("partials", partials, PARTIALS, PlanError),
        NAMES.changes,
    )


def _kernel(kernel: Any) -> str:
    """The name of a kernel, or "emulated:" with the flop/s to emulate, see `kernels.emulated`."""
    if not isinstance(kernel, str) or not kernel.startswith(EMULATED):
        name = text("kernel", kernel, PlanError)
        return AUTO_KERNEL if name == "auto" else str(parse(name, PlanError))
    try:
        flops = float(kernel.removeprefix(EMULATED))
    except ValueError:
        flops = 0.0
    if not 0 < flops < float("inf"):
        raise PlanError(f"kernel={short_repr(kernel)}; pass the flop/s to emulate as a positive number, as in 'emulated:50e9'")
    return f"{EMULATED}{flops:g}"


def _world(world: Any) -> int:
    """The number of ranks; a mesh or group is recognised by its `size` method, so that torch is not imported."""
    dimensions = getattr(world, "ndim", 1)
    if isinstance(dimensions, int) and dimensions > 1:
        raise PlanError(
            f"world has {dimensions} dimensions ({short_repr(world)}); pass the dimension that the sequence is cut over, "
            "as in mesh['sequence']"
        )
    try:
        world = world.size() if callable(getattr(world, "size", None)) else world
    except Exception:  # a class, or another object with a `size`
        raise PlanError(f"world={short_repr(world)}; pass the number of ranks, or a mesh or group of them") from None
    return count("world", world, PlanError, most=MOST_RANKS)


def _dtype(dtype: Any) -> Any:
    """The name of a dtype of torch; other values unchanged."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, str) or type(dtype).__module__ == "torch" else dtype


def _mask(mask: Any) -> Mask:
    return instance(
        "mask", mask, Mask, PlanError, "call one of full(), causal(), sliding_window(..), documents(..), prefix_lm(..)"
    )


def _degrees(ulysses: Any, world: int, heads: int, schedule: Any) -> tuple[int, ...]:
    """The requested degree; otherwise all that leave every rank a head, or 1 where a schedule is named."""
    choices = tuple(degree for degree in factors(world, upto=world) if degree <= heads)
    if ulysses is None:
        return choices if isinstance(schedule, str) and schedule == "auto" else (1,)
    degree = count("ulysses", ulysses, PlanError)
    if degree not in choices:
        reason = f"does not divide world={world}" if world % degree else f"leaves some ranks none of the {heads} heads"
        raise PlanError(f"ulysses={degree} {reason}; choose one of {list(choices)}, or None")
    return (degree,)


def topology_for(topology: Any, world: int) -> Topology:
    if topology is None:
        topology = DEFAULT_TOPOLOGY
    resolved = topology if isinstance(topology, Topology) else PRESETS.get(topology) if isinstance(topology, str) else None
    if resolved is None:
        raise PlanError(
            f"topology={short_repr(topology)}; choose one of {', '.join(PRESETS)}, or read a file with load_topology(path)"
        )
    if resolved.world not in (None, world):
        raise PlanError(
            f"topology {resolved.name!r} describes {resolved.world} ranks and world={world}; measure these, or name a preset"
        )
    return resolved


def _layouts(layout: Any, seq_len: int, world: int, mask: Mask, kv_len: Any, q_offset: Any) -> tuple[Layout, ...]:
    """The layout itself, or the layouts of that name, for queries and keys alike."""
    if isinstance(layout, Layout):
        if layout.world != world:
            raise PlanError(f"layout={layout.name!r} has {layout.world} shards and world={world}; build it for as many ranks")
        layout.validate(seq_len)
        for name, value, actual in (("kv_len", kv_len, layout.of_keys.length), ("q_offset", q_offset, layout.first)):
            if value is not None and as_int(name, value, PlanError) != actual:
                raise PlanError(
                    f"{name}={short_repr(value)} and layout={layout.name!r} has {actual}; leave {name} out: it is the layout's"
                )
        _check_mask_length(mask, layout.length, layout.of_keys.length, layout.first)
        return (layout,)
    name = one_of("layout", layout, ("auto", *LAYOUTS, "documents"), PlanError)
    keys = seq_len if kv_len is None else count("kv_len", kv_len, PlanError)
    offset = _offset(q_offset, seq_len, keys, mask)
    _check_mask_length(mask, seq_len, keys, offset)
    packed = mask.bounds if (keys, offset) == (seq_len, 0) and mask.bounds[-1:] == (seq_len,) else ()
    if name == "documents" and not packed:
        raise PlanError(f"layout='documents' and mask={mask}; this layout needs packed documents, and as many keys as queries")
    # Where every query sees every key, no layout is better balanced than contiguous.
    plain = mask == full() or world == 1
    choices = ["contiguous"] if plain else ["contiguous", "documents", "zigzag"] if len(packed) > 2 else list(LAYOUTS)
    return tuple(
        by_documents(packed, world) if choice == "documents" else _make_layout(choice, seq_len, world, keys, offset)
        for choice in (choices if name == "auto" else [name])
    )


def _make_layout(name: str, seq_len: int, world: int, keys: int, offset: int) -> Layout:
    layout = LAYOUTS[name](seq_len, world)
    return layout if (keys, offset) == (seq_len, 0) else replace(layout.moved(offset), keys=LAYOUTS[name](keys, world))


def _offset(q_offset: Any, seq_len: int, keys: int, mask: Mask) -> int:
    """The position of the first query among the keys; 0 where it makes no difference."""
    if q_offset is None:
        if keys == seq_len or mask == full():
            return 0
        raise PlanError(
            f"kv_len={keys}, seq_len={seq_len} and mask={mask}: pass the position of the first query among the keys, "
            f"as in q_offset={max(0, keys - seq_len)}"
        )
    offset = as_int("q_offset", q_offset, PlanError, must="a whole number, 0 or more")
    if offset < 0:
        raise PlanError(f"q_offset={q_offset!r}; must be a whole number, 0 or more")
    return count("q_offset", offset, PlanError, least=0)


def _check_mask_length(mask: Mask, seq_len: int, keys: int, offset: int) -> None:
    if mask.length not in (None, keys) or (mask.length is not None and offset + seq_len > keys):
        plain = (keys, offset) == (seq_len, 0)
        beyond = f"seq_len={seq_len}" if plain else f"kv_len={keys}, seq_len={seq_len} from {offset} on"
        last = "seq_len" if plain else "kv_len, and queries lie before it"
        raise PlanError(f"mask={mask} is for {mask.length} tokens and {beyond}; cu_seqlens must end with {last}")


_check_once = lru_cache(maxsize=64)(check)


def _schedule_names() -> tuple[str, ...]:
    return ("auto", *NAMES, "balanced")


def _schedule(schedule: Any, world: int, heads: int, degree: int) -> str | HeadGroups:
    if isinstance(schedule, str):
        return one_of("schedule", schedule, _schedule_names(), PlanError)
    head_groups = (
        (schedule,) if isinstance(schedule, Schedule) else tuple(schedule) if isinstance(schedule, list | tuple) else ()
    )
    if not head_groups or not all(isinstance(head_group, Schedule) for head_group in head_groups):
        raise PlanError(
            f"schedule={short_repr(schedule)}; pass a name ({', '.join(_schedule_names())}), a Schedule, or a tuple of them"
        )
    for head_group in head_groups:
        if head_group.world * degree != world:
            within = f"world={world}" + (f", ulysses={degree}" if degree > 1 else "")
            raise PlanError(
                f"schedule {head_group.name!r} is for {head_group.world} ranks and {within}; build it for {world // degree}"
            )
        # Schedules with fewer tiles are for one mask, and checked with it.
        if len(head_group.tiles) >= len(head_group.q_owner) * len(head_group.kv_owner):
            _check_once(head_group)
    if (
        len(head_groups) * degree > heads
        and not any(head_group.has_residents for head_group in head_groups)
        and len(head_groups) != 2
    ):
        raise PlanError(
            f"schedule has {len(head_groups)} head groups and heads={heads} are too few for them; pass fewer head groups"
        )
    if degree > 1:
        head_groups = tuple(
            schedule
            for members in zip(*(ulysses(schedule, degree) for schedule in head_groups), strict=True)
            for schedule in members
        )
    return head_groups
