"""Random plans and features: ranks, lengths, layouts, masks and heads, in fp64 against dense attention.

Every case is one plan on the simulated transport, its ranks taking turns in a random order. CI draws `CASES`; for longer runs:

    pytest tests/execution/test_properties.py --cases 50000
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import EXACT, SCHEDULES, simulate, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from meaning import dense

from ringattn import Layout, Mask, causal, documents, full, make_plan, prefix_lm, sliding_window
from ringattn.comm.simulated import Simulated
from ringattn.sequence.layout import Span

pytestmark = pytest.mark.slow

CASES = 1200
HEADS = ((4, 4), (4, 2), (6, 2), (4, 1), (9, 3), (1, 1))


@st.composite
def masks(draw: st.DrawFn, length: int) -> Mask:
    """One of the kinds there are, or two of them intersected."""
    windows = st.builds(sliding_window, st.integers(0, length), st.integers(0, length))
    cuts = st.lists(st.integers(0, length), max_size=6).map(lambda inner: (0, *sorted(inner), length))
    single = st.one_of(
        st.sampled_from([full(), causal()]),
        windows,
        st.builds(documents, cuts, st.booleans()),
        st.builds(prefix_lm, st.integers(0, length)),
    )
    mask = draw(single)
    return mask & draw(single) if draw(st.booleans()) else mask


@st.composite
def shards(draw: st.DrawFn, length: int, world: int, first: int = 0) -> tuple[tuple[Span, ...], ...]:
    """[first, first + length) cut at drawn places and dealt in a drawn order: ranks with much, little or nothing."""
    inner = draw(st.lists(st.integers(0, length), max_size=2 * world))
    cuts = [0, *sorted(inner), length]
    spans = [Span(first + a, b - a) for a, b in pairwise(cuts) if a < b]
    ranks = [draw(st.integers(0, world - 1)) for _ in spans]
    return tuple(tuple(span for span, rank in zip(spans, ranks, strict=True) if rank == r) for r in range(world))


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_plan."""
    world, length = draw(st.integers(1, 5)), draw(st.integers(1, 33))
    cross = draw(st.booleans())
    keys = draw(st.integers(1, 33)) if cross else length
    offset = draw(st.integers(0, 20)) if cross else 0
    mask = draw(masks(max(keys, offset + length)) if not cross else st.one_of(
        st.sampled_from([full(), causal()]), st.builds(sliding_window, st.integers(0, keys), st.integers(0, keys)),
        st.builds(prefix_lm, st.integers(0, keys)),
    ))  # fmt: skip
    heads, kv_heads = draw(st.sampled_from(HEADS))
    names = ["contiguous", "zigzag", "striped", "drawn", *["documents"] * bool(mask.bounds and not cross)]
    layout = draw(st.sampled_from(names))
    drawn = dict(seq_len=length, world=world, heads=heads, kv_heads=kv_heads, head_dim=4, dtype="float64", mask=mask)
    if layout == "drawn":
        of_keys = Layout("drawn", draw(shards(keys, world))) if cross else None
        drawn["layout"] = Layout("drawn", draw(shards(length, world, offset)), of_keys)
    else:
        drawn |= dict(layout=layout, kv_len=keys, q_offset=offset)
    degrees = [n for n in range(2, world + 1) if world % n == 0 and n <= heads]
    schedule = draw(st.sampled_from(["named", *SCHEDULES]))
    if schedule == "named":
        drawn |= dict(schedule=draw(st.sampled_from(["ring", "token_ring", "mesh", "all_gather"])))
        drawn |= dict(ulysses=draw(st.sampled_from([1, *degrees])))
    else:
        built = SCHEDULES[schedule](world)
        head_groups = built if isinstance(built, tuple) else (built,)
        drawn["schedule"] = (
            built
            if len(head_groups) <= heads or any(head_group.has_residents for head_group in head_groups)
            else head_groups[0]
        )
    return drawn


@st.composite
def features(draw: st.DrawFn, kv_heads: int) -> dict[str, Any]:
    """Arguments of attention."""
    return dict(
        bias_heads=draw(st.sampled_from([None, 1, kv_heads])),
        hidden=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 3.0])),
        scale=draw(st.sampled_from([0.5, -1.5, 20.0])),
        value_dim=draw(st.sampled_from([4, 1, 7])),
        batch=draw(st.integers(1, 2)),
        kernel=draw(st.sampled_from(["sdpa", "reference"])),
    )


def is_exact(plan_arguments: dict[str, Any], drawn: dict[str, Any], seed: int) -> None:
    plan = make_plan(**plan_arguments, kernel=drawn["kernel"])
    source = torch.Generator().manual_seed(seed)
    size = drawn["batch"]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    q, k = randn(size, plan.seq_len, plan.heads, 4), randn(size, plan.kv_len, plan.kv_heads, 4)
    v, dout = (randn(size, n, h, drawn["value_dim"]) for n, h in ((plan.kv_len, plan.kv_heads), (plan.seq_len, plan.heads)))
    options: dict[str, Any] = dict(scale=drawn["scale"], softcap=drawn["softcap"])
    extra = {}
    if drawn["bias_heads"] is not None:
        bias = randn(size, drawn["bias_heads"], plan.kv_len)
        dead = torch.rand(size, 1, plan.kv_len, generator=source) < drawn["hidden"]
        extra["key_bias"] = bias.masked_fill(dead, -torch.inf).requires_grad_()
    if drawn["sinks"]:
        extra["sinks"] = randn(plan.heads).requires_grad_()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, plan.mask, **options, **extra, offset=plan.layout.first)
    expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, [*leaves, *extra.values()], dout))
    actual = simulate(plan, q, k, v, dout, transport=Simulated(plan.world, shuffle=seed), **options, **extra)
    size_of = max(1.0, *(x[x.isfinite()].abs().max().item() for x in expected if x.isfinite().any()))
    assert worst(actual, expected) < EXACT * size_of, f"{plan}\n{drawn}"


@pytest.mark.timeout(600)  # thousands of cases in one test; none can hang, the simulated transport raises when it stalls
def test_any_plan_with_any_feature_is_dense_attention(request: pytest.FixtureRequest) -> None:
    run = given(plan_arguments=arguments(), data=st.data(), seed=st.integers(0, 2**16))(_check_case)
    settings(max_examples=request.config.getoption("cases") or CASES, deadline=None)(run)()


def _check_case(plan_arguments: dict[str, Any], data: st.DataObject, seed: int) -> None:
    is_exact(plan_arguments, data.draw(features(plan_arguments["kv_heads"])), seed)
