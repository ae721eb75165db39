"""Features of attention, each over three ranks: gradients by finite differences, bits that do not depend on timing, extreme
logits and biases.
"""

from typing import Any

import pytest
import torch
from cases import EXACT, SCHEDULES, simulate, worst
from meaning import dense

from ringattn import Plan, causal, documents, full, make_plan, prefix_lm, sliding_window
from ringattn.comm.simulated import Simulated
from ringattn.execution.autograd import Inputs, attend
from ringattn.execution.sharding import positions
from ringattn.kernels import Options
from ringattn.planner.cost import traffic

WORLD, LENGTH, DIM = 3, 7, 2
MODEL: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=DIM, dtype="float64")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"plan": {"mask": sliding_window(2, 1)}},
    "documents": {"plan": {"mask": documents((0, 2, 3, 7)), "layout": "documents"}},
    "prefix": {"plan": {"mask": prefix_lm(3)}},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.9},
    "values of another size": {"value_dim": 3},
    "key_bias": {"key_bias": (1, 1, LENGTH)},
    "key_bias of each head": {"key_bias": (1, 2, LENGTH)},
    "sinks": {"sinks": (4,)},
    "everything": {"softcap": 2.0, "scale": 1.1, "value_dim": 1, "key_bias": (1, 2, LENGTH), "sinks": (4,)},
    "more keys than queries": {"plan": {"kv_len": 9, "q_offset": 2}},
    "cross": {"plan": {"kv_len": 5, "mask": full()}},
}


@pytest.mark.parametrize("schedule", ["ring", "token_ring", "ulysses"])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature: str, schedule: str) -> None:
    arguments = dict(FEATURES[feature])
    plan = make_plan(
        LENGTH, world=WORLD, **MODEL | {"mask": causal()} | arguments.pop("plan", {}), schedule=SCHEDULES[schedule](WORLD)
    )
    shapes = [(1, LENGTH, 4, DIM), (1, plan.kv_len, 2, DIM), (1, plan.kv_len, 2, arguments.pop("value_dim", DIM))]
    names = [name for name in ("key_bias", "sinks") if name in arguments]
    tensors = [randn(*shape, seed=n) for n, shape in enumerate([*shapes, *(arguments.pop(name) for name in names)])]
    options = Options(arguments.pop("scale", 0.5), arguments.pop("softcap", None))

    def sharded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        more = dict(zip(names, extra, strict=True))
        inputs = []
        for rank in range(WORLD):
            rows, keys = positions(plan, rank) - plan.layout.first, positions(plan, rank, keys=True)
            bias = more["key_bias"][..., keys] if "key_bias" in more else None
            inputs.append(Inputs(q[:, rows], k[:, keys], v[:, keys], bias, more.get("sinks")))
        return torch.cat([out for out, _ in attend(inputs, plan, options, Simulated(WORLD))], dim=1)

    assert torch.autograd.gradcheck(sharded_attention, [x.requires_grad_() for x in tensors], fast_mode=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_inputs_give_the_same_bits(schedule: str) -> None:
    """In any order of arrival: messages are merged in the order of the schedule."""
    arguments = dict(heads=4, kv_heads=2, head_dim=16, dtype="bfloat16", schedule=SCHEDULES[schedule](4), layout="zigzag")
    plan = make_plan(61, world=4, **arguments)
    q, k, v, dout = (randn(2, 61, h, 16, seed=n).bfloat16() for n, h in enumerate((4, 2, 2, 4)))
    first = simulate(plan, q, k, v, dout)
    for seed in range(4):
        late = Simulated(4, delay=lambda m, seed=seed: hash((m.src, m.dst, m.depart, seed)) % 5, shuffle=seed)
        again = simulate(plan, q, k, v, dout, transport=late)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), seed


def plans(**arguments: Any) -> list[Plan]:
    return [
        make_plan(29, world=5, **MODEL | {"head_dim": 8}, schedule=name, **arguments) for name in ("ring", "token_ring", "mesh")
    ]


@pytest.mark.parametrize("mask", [causal(), full(), sliding_window(3)], ids=str)
def test_logits_of_ten_thousand(mask: Any) -> None:
    """Softmax is then a choice of one key, and lse as large as the logits: still that of dense attention."""
    q, k, v, dout = (randn(2, 29, h, 8, seed=n) for n, h in enumerate((4, 2, 2, 4)))
    q = (q * 3e3).requires_grad_()
    leaves = [q, k.requires_grad_(), v.requires_grad_()]
    out, lse = dense(*leaves, mask)
    assert lse.abs().max() > 1e4
    expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
    # A logit of size L has an error of L * eps, and so has every weight, relatively; gradients are multiplied by q or k.
    unit = 8 * torch.finfo(torch.float64).eps * lse.abs().max().item()
    sizes = [1.0, 1.0, k.abs().max().item(), q.abs().max().item(), 1.0]
    for plan in plans(mask=mask):
        for name, a, b, size in zip(
            ("out", "lse", "dq", "dk", "dv"), simulate(plan, q, k, v, dout), expected, sizes, strict=True
        ):
            assert worst((a,), (b,)) < unit * size, name


def test_shards_without_visible_keys() -> None:
    """All keys of the first rank, then all keys, have a bias of -inf: rows without a key give 0, -inf and no gradient."""
    q, k, v, dout = (randn(1, 29, h, 8, seed=n) for n, h in enumerate((4, 2, 2, 4)))
    for hidden in (slice(0, 6), slice(0, 29)):
        bias = torch.zeros(1, 1, 29, dtype=torch.float64)
        bias[..., hidden] = -torch.inf
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out, lse = dense(*leaves[:3], causal(), key_bias=leaves[3])
        expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
        for plan in plans(layout="contiguous"):
            assert worst(simulate(plan, q, k, v, dout, key_bias=bias.clone().requires_grad_()), expected) < EXACT


def test_the_plan_chooses_the_dtype_in_which_sums_travel() -> None:
    """Wide costs bytes, narrow costs digits, auto is wide where rounding would add up."""
    q, k, v, dout = (randn(1, 256, h, 32, seed=n).bfloat16() for n, h in enumerate((4, 4, 4, 4)))
    exact = dense(*(x.double() for x in (q, k, v)), causal())[0]
    by_dtype = {}
    for partials in ("wide", "auto", "narrow"):
        arguments = dict(heads=4, head_dim=32, dtype="bfloat16", partials=partials)
        plan = make_plan(256, world=8, **arguments, schedule=SCHEDULES["accumulating_ring"](8), layout="zigzag")
        error = (simulate(plan, q, k, v, dout)[0].double() - exact).square().mean().sqrt().item()
        by_dtype[partials] = sum(traffic(plan).values()), error
        assert partials in plan.partials
    assert by_dtype["wide"] == by_dtype["auto"], "an accumulator that is passed from rank to rank is never rounded on its way"
    assert by_dtype["narrow"][0] < by_dtype["wide"][0] and by_dtype["narrow"][1] > 1.2 * by_dtype["wide"][1]
    direct_plans = [
        make_plan(256, world=8, heads=4, head_dim=32, dtype="bfloat16", partials=p, schedule="token_ring")
        for p in ("auto", "wide")
    ]
    assert sum(traffic(direct_plans[0]).values()) < sum(traffic(direct_plans[1]).values())
    assert direct_plans[0].digest != direct_plans[1].digest
