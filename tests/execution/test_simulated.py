"""Every schedule x layout x mask x ranks x heads, forward and backward, against dense attention in fp64, in one process."""

from functools import lru_cache

import pytest
import torch
from cases import EXACT, HEADS, MASKS, Case, Example, example, product_of_everything, simulate, worst
from meaning import dense

from ringattn import StalledError, documents, make_plan, prefix_lm, sliding_window
from ringattn.comm.simulated import Simulated

cached_example = lru_cache(maxsize=64)(lambda heads, length, mask: example(HEADS[heads], length, MASKS[mask]))


def expected(e: Example) -> tuple[torch.Tensor, ...]:
    return (e.out.detach(), e.lse.detach(), *e.grads)


@pytest.mark.slow
@pytest.mark.timeout(240)  # many cases in one test; none can hang, the simulated transport raises when it stalls
@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("length", [37, 5], ids=["uneven", "some_ranks_empty"])
def test_every_case_equals_dense_attention(world: int, length: int) -> None:
    cases = list(product_of_everything(range(world, world + 1), length))
    # Beyond four ranks every other case, on odd numbers of ranks the others; test_properties.py draws from them all.
    for case in cases if world < 5 else cases[world % 2 :: 2]:
        e = cached_example(case.heads, length, case.mask)
        actual = simulate(case.plan(), e.q, e.k, e.v, e.dout)
        assert worst(actual, expected(e)) < EXACT, case


@pytest.mark.parametrize(
    "mask",
    [
        sliding_window(5),
        sliding_window(3, 4),
        prefix_lm(9),
        documents([0, 3, 4, 20, 37]),
        documents([0, 11, 37], causal=False),
        documents([0, 17, 37]) & sliding_window(4),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_other_masks(mask, kernel: str) -> None:
    e = example((4, 2), 37, mask)
    for layout in ("contiguous", "zigzag", "striped"):
        for schedule in ("ring", "bidirectional_ring", "token_ring"):
            plan = make_plan(
                37,
                world=3,
                heads=4,
                kv_heads=2,
                head_dim=8,
                dtype="float64",
                mask=mask,
                schedule=schedule,
                layout=layout,
                kernel=kernel,
            )
            assert worst(simulate(plan, e.q, e.k, e.v, e.dout), expected(e)) < EXACT, (schedule, layout)


@pytest.mark.parametrize("schedule", ["ring", "bidirectional_ring", "token_ring"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("bias_heads", [None, 3])
def test_bias_sinks_softcap_and_scale(schedule: str, kernel: str, bias_heads: int | None) -> None:
    case = Case("ring", "zigzag", "causal", "9over3", 3, 23)
    e = example(HEADS["9over3"], 23, MASKS["causal"])
    bias = torch.randn((2, 23) if bias_heads is None else (2, bias_heads, 23), dtype=torch.float64)
    bias[..., 0] = -torch.inf  # the first query sees nothing but the sink
    bias.requires_grad_()
    sinks = torch.randn(9, dtype=torch.float64, requires_grad=True)
    options = dict(key_bias=bias, sinks=sinks, scale=0.7, softcap=5.0 if schedule == "ring" else None)
    out, lse = dense(e.q, e.k, e.v, MASKS["causal"], **options)
    expected_results = (out.detach(), lse.detach(), *torch.autograd.grad(out, (e.q, e.k, e.v, bias, sinks), e.dout))
    engine_bias = bias if bias_heads else bias[:, None]
    actual = simulate(
        case.plan(schedule=schedule, kernel=kernel), e.q, e.k, e.v, e.dout, **options | dict(key_bias=engine_bias)
    )
    *actual, dbias, dsinks = actual
    dbias = dbias if bias_heads else dbias[:, 0]
    assert worst((*actual, dbias, dsinks), expected_results) < EXACT


def test_rows_that_see_nothing_are_zero_and_harm_nobody() -> None:
    case = Case("token_ring", "contiguous", "full", "mha", 4, 16)
    e = example(HEADS["mha"], 16, MASKS["full"])
    bias = torch.zeros(2, 1, 16, dtype=torch.float64)
    bias[0] = -torch.inf
    out, lse, dq, dk, dv = simulate(case.plan(), e.q, e.k, e.v, e.dout, key_bias=bias.requires_grad_())[:5]
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert all((grad[0] == 0).all() for grad in (dq, dk, dv))
    assert worst((out[1:], dq[1:]), (e.out.detach()[1:], e.grads[0][1:])) < EXACT


@pytest.mark.parametrize("schedule", ["ring", "bidirectional_ring", "token_ring", "token_ring_direct"])
def test_arrival_order_changes_no_bit(schedule: str) -> None:
    case = Case(schedule, "zigzag", "causal", "9over3", 5, 41)
    e = example(HEADS["9over3"], 41, MASKS["causal"])
    inputs = [x.detach().float() for x in (e.q, e.k, e.v, e.dout)]
    plan = case.plan(dtype="float32")
    calm = simulate(plan, *inputs)
    for seed in range(5):
        rough = Simulated(5, delay=lambda m, seed=seed: hash((m.src, m.dst, m.depart, seed)) % 7, shuffle=seed)
        assert all(torch.equal(a, b) for a, b in zip(calm, simulate(plan, *inputs, transport=rough), strict=True))


def test_a_lost_message_stalls_and_says_who_waits_for_what() -> None:
    case = Case("token_ring", "contiguous", "full", "mha", 3, 12)
    e = example(HEADS["mha"], 12, MASKS["full"])
    lossy = Simulated(3, drop=lambda m: (m.src, m.dst, m.depart) == (1, 2, 1))
    with pytest.raises(StalledError, match=r"rank 2 waits for Q0 from rank 1 to rank 2, departing in step 1.*\(forward"):
        simulate(case.plan(), e.q, e.k, e.v, e.dout, transport=lossy)
