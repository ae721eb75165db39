"""Bad values for every public function, in one process: it returns, or raises an error of ringattn that names the argument."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hostile import each_alone, several, survives, two_at_once
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn import Layout, Mask, Plan, Schedule, Topology, causal, make_plan
from ringattn.schedule import (
    BufferLimits,
    Kind,
    Move,
    accumulating_ring,
    bidirectional_ring,
    both_ways,
    check,
    divide,
    make,
    mesh,
    parse,
    peak,
    prune,
    ring,
    side_by_side,
    split,
    take_turns,
    token_ring,
    ulysses,
)
from ringattn.sequence.layout import Span, contiguous
from ringattn.sequence.mask import Band, Rect

MODEL = dict(heads=4, kv_heads=2, head_dim=8)
MATRIX = ((0.0, 1e9), (1e9, 0.0))

PLAN: Plan = make_plan(13, world=1, **MODEL, schedule="ring")
LAYOUT, MASK, RING = contiguous(13, 2), causal(), ring(2)
LINKS = Topology("links", "matrix", 1e9, world=2, latencies=MATRIX, bandwidths=MATRIX)
ALL = Topology("all", "nodes", 1e9, 1e-6, 1e9, 8, 1e-6, 1e9, True, None, (), (), None, 0.0, 1e9)
SAVED = Path(mkdtemp()) / "links.json"
LINKS.save(SAVED)
PLANNED = dict(
    **MODEL,
    **dict(seq_len=13, world=2, dtype="float32", mask=causal(), schedule="ring", layout="zigzag", ulysses=1, kernel="auto"),
    **dict(topology="cpu", buffer_limit=10**9, training=True, kv_len=13, q_offset=0, partials="auto"),
)
ONE = torch.zeros(2, 13, 4, 8)

# Of each function, arguments that are fine.
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "make_plan": (make_plan, PLANNED),
    "full": (ringattn.full, {}),
    "sliding_window": (ringattn.sliding_window, dict(left=3, right=1)),
    "documents": (ringattn.documents, dict(cu_seqlens=[0, 4, 13], causal=True)),
    "prefix_lm": (ringattn.prefix_lm, dict(prefix=3)),
    "Mask": (Mask, dict(name="mine", rects=(Rect(0, 9, 0, 9, Band()),), length=9)),
    "Mask.keeps": (MASK.keeps, dict(q=1, k=0)),
    "Mask.near": (MASK.near, dict(start=0, stop=3)),
    "Mask &": (MASK.__and__, dict(other=causal())),
    "Rect in Mask": (
        lambda **rect: Mask("mine", (Rect(**rect),)).bounds,
        dict(q_start=0, q_stop=9, k_start=0, k_stop=9, band=Band()),
    ),
    "Layout": (Layout, dict(name="mine", shards=((Span(0, 7),), (Span(7, 6),)), keys=contiguous(13, 2))),
    "Span in Layout": (lambda **span: Layout("mine", ((Span(**span),),)).validate(9), dict(start=0, length=9, stride=1)),
    "Layout.rows": (LAYOUT.rows, dict(rank=1)),
    "Layout.positions": (LAYOUT.positions, dict(rank=1)),
    "Layout.moved": (LAYOUT.moved, dict(by=3)),
    "Layout.after": (LAYOUT.after, dict(before=contiguous(13, 2))),
    "Layout.validate": (LAYOUT.validate, dict(seq_len=13)),
    "Plan.rows": (PLAN.rows, dict(rank=0)),
    "Topology": (Topology, {name: getattr(ALL, name) for name in Topology.__dataclass_fields__}),
    "Topology, measured": (Topology, {name: getattr(LINKS, name) for name in Topology.__dataclass_fields__}),
    "Topology.latency": (LINKS.latency, dict(src=0, dst=1)),
    "Topology.route": (ALL.route, dict(src=0, dst=1)),
    "load_topology": (ringattn.load_topology, dict(path=SAVED)),
    "Schedule": (Schedule, {name: getattr(RING, name) for name in Schedule.__dataclass_fields__}),
    "Move in Schedule": (
        lambda **move: make("mine", 2, RING.tiles, [Move(**move)], BufferLimits(9, 9, 9, 9)).digest,
        dict(kind=Kind.Q, index=0, src=0, dst=1, depart=0, arrival=1),
    ),
    "Schedule.owner": (RING.owner, dict(kind=Kind.Q, index=1)),
    "Schedule.resident_rank": (RING.resident_rank, dict(kind=Kind.Q, index=1)),
    "Schedule.moves_to_resident": (RING.moves_to_resident, dict(move=RING.moves[0])),
    "Schedule.returns_to_owner": (RING.returns_to_owner, dict(kind=Kind.Q_ACC)),
    "make": (
        make,
        dict(
            name="mine",
            world=2,
            tiles=RING.tiles,
            moves=RING.moves,
            limits=RING.limits,
            owners=((0, 1), (0, 1)),
            residents=((), ()),
        ),
    ),
    "parse": (parse, dict(text=str(RING))),
    "check": (check, dict(schedule=RING, alive={(0, 0), (0, 1), (1, 0), (1, 1)})),
    "peak": (peak, dict(schedule=RING)),
    "prune": (prune, dict(schedule=RING, alive={(0, 0)})),
    "split": (split, dict(schedule=RING, q=2, kv=1)),
    "divide": (divide, dict(schedule=RING, q=2, kv=1)),
    "take_turns": (take_turns, dict(schedule=ring(3, routing="direct"), q=2, kv=1)),
    "both_ways": (both_ways, dict(schedule=RING)),
    "side_by_side": (side_by_side, dict(a=RING, b=RING)),
    "ring": (ring, dict(world=3, routing="hop", direction=1, lookahead=1)),
    "token_ring": (token_ring, dict(world=3, routing="hop", direction=1, lookahead=1)),
    "accumulating_ring": (accumulating_ring, dict(world=3, direction=1)),
    "bidirectional_ring": (bidirectional_ring, dict(world=3, routing="hop", lookahead=1)),
    "mesh": (mesh, dict(world=4, a=2, q_routing="hop", kv_routing="hop")),
    "ulysses": (ulysses, dict(inner=RING, degree=2, stages=1, groups=2)),
    "shard": (ringattn.shard, dict(x=ONE, plan=PLAN, dim=1, rank=0, keys=False)),
    "unshard": (ringattn.unshard, dict(x=ONE, plan=PLAN, dim=1, group=None, keys=False)),
    "positions": (ringattn.positions, dict(plan=PLAN, rank=0, keys=False)),
    "attention": (
        ringattn.attention,
        dict(q=ONE, k=ONE[:, :, :2], v=ONE[:, :, :2], plan=PLAN, key_bias=torch.zeros(2, 13), scale=0.5, sinks=torch.zeros(4))
        | dict(softcap=9.0, group=None, return_lse=True, check_finite="layer 3", strict=None),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_alone(name: str) -> None:
    each_alone(name, *FUNCTIONS[name])


@given(st.data())
def test_two_arguments_at_once(data: st.DataObject) -> None:
    two_at_once(data, *FUNCTIONS[data.draw(st.sampled_from(several(FUNCTIONS)))])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=9
)


@given(data=st.data())
def test_damaged_topology_files(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One entry replaced by any JSON value, or any bytes of the file."""
    path = tmp_path_factory.getbasetemp() / "links.json"
    LINKS.save(path)
    text = path.read_text()
    if data.draw(st.booleans()):
        stored = json.loads(text)
        stored[data.draw(st.sampled_from([*sorted(stored), "more"]))] = data.draw(JSON)
        path.write_text(json.dumps(stored))
    else:
        start = data.draw(st.integers(0, len(text)))
        path.write_bytes(
            text[:start].encode() + data.draw(st.binary(max_size=9)) + text[start + data.draw(st.integers(0, 9)) :].encode()
        )
    survives(lambda: ringattn.load_topology(path).route(0, 1))


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 10**5, "1" * 10**5, "", "\0", "null", "[]"])
def test_files_that_are_no_topology(text: str, tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text(text)
    assert survives(lambda: ringattn.load_topology(tmp_path / "links.json")) is not None
