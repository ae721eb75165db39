"""Attention is differentiated once, backward. Every other way of differentiating it raises on every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SCHEDULES
from spawn import run_ranks
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ringattn import InputError, Plan, attention, causal, make_plan, shard
from ringattn.comm.simulated import Simulated
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options

TWICE = "a second derivative of attention"


def plan_for(world: int, schedule: Any = "ring", **more: Any) -> Plan:
    return make_plan(12, world=world, heads=2, head_dim=4, dtype="float64", mask=causal(), schedule=schedule, **more)


def leaves(plan: Plan, rank: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    full_tensors = {name: torch.randn(1, 12, 2, 4, dtype=torch.float64) for name in "qkv"} | {
        "key_bias": torch.randn(1, 12).double()
    }
    own = {name: shard(x, plan, rank=rank) for name, x in full_tensors.items()} | {"sinks": torch.randn(2, dtype=torch.float64)}
    return {name: x.requires_grad_() for name, x in own.items()}


def penalty(function: Callable[..., Tensor], kwargs: dict[str, Tensor], first: str, plan: Plan) -> Tensor:
    """A loss with the square of the gradient of one input. The factor is a constant, so the gradient of out is one too."""
    out = function(**kwargs, plan=plan)
    factor = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    (grad,) = torch.autograd.grad((out * factor).sum(), kwargs[first], create_graph=True)
    return out.sum() + grad.square().sum()


def recomputed(plan: Plan, **kwargs: Tensor) -> Tensor:
    names = list(kwargs)
    return checkpoint(
        lambda *x: attention(plan=plan, **dict(zip(names, x, strict=True))), *kwargs.values(), use_reentrant=False
    )


@pytest.mark.parametrize("form", [attention, recomputed])
@pytest.mark.parametrize("reuse_inputs", [False, True], ids=["inputs saved", "inputs not saved"])
def test_every_second_derivative_raises(
    form: Callable[..., Tensor], reuse_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "reuse_inputs", reuse_inputs)  # as Ulysses: no saved tensor depends on q, k and v
    plan = plan_for(1)
    for first in ("q", "k", "v", "key_bias", "sinks"):
        for second in ("q", "k", "v", "key_bias", "sinks"):
            kwargs = leaves(plan)
            loss = penalty(form, kwargs, first, plan)
            with pytest.raises(InputError, match=TWICE):  # allow_unused would turn a lost gradient into zeros
                torch.autograd.grad(loss, kwargs[second], allow_unused=True, materialize_grads=True)


def test_the_gradient_of_a_gradient_by_the_gradient_of_out_raises() -> None:
    plan, kwargs = plan_for(1), leaves(plan_for(1))
    out = attention(**kwargs, plan=plan)
    dout = torch.randn_like(out).requires_grad_()
    (grad,) = torch.autograd.grad(out, kwargs["v"], dout, create_graph=True)
    with pytest.raises(InputError, match=TWICE):
        torch.autograd.grad(grad.sum(), dout)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_second_derivative_raises_on_every_schedule(schedule: str) -> None:
    plan = plan_for(3, SCHEDULES[schedule](3))
    q = torch.randn(1, 12, 2, 4, dtype=torch.float64, requires_grad=True)
    rows = [q[:, plan.layout.positions(rank)] for rank in range(3)]
    results = attend([Inputs(x, x, x) for x in rows], plan, Options(0.5), Simulated(3))
    out = torch.cat([o for o, _ in results], dim=1)
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), q, create_graph=True)
    with pytest.raises(InputError, match=TWICE):
        (out.sum() + grad.square().sum()).backward()


def test_first_derivatives_are_unchanged_with_create_graph() -> None:
    plan, kwargs = plan_for(1), leaves(plan_for(1))
    out, names = attention(**kwargs, plan=plan), list(kwargs)
    plain = torch.autograd.grad(out.sin().sum(), [kwargs[name] for name in names], retain_graph=True)
    graph = torch.autograd.grad(out.sin().sum(), [kwargs[name] for name in names], create_graph=True)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(plain, graph, strict=True))


def test_the_hint_of_the_error_works() -> None:
    """The square of the gradient, by torch's own attention, has the derivative that finite differences find."""
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def squared(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(x, x, x, is_causal=True)
        (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return grad.square().sum()

    assert torch.autograd.gradcheck(squared, x)


@pytest.mark.parametrize("ulysses", [None, 1])
@pytest.mark.parametrize(("backend", "error", "text"), [
    ("eager", InputError, TWICE), ("aot_eager", RuntimeError, "does not currently support double backward"),
])  # fmt: skip
def test_compiled_code_raises_too(backend: str, error: type[Exception], text: str, ulysses: int | None) -> None:
    torch._dynamo.reset()
    plan = plan_for(1, ulysses=ulysses)
    compiled, kwargs = torch.compile(attention, backend=backend, fullgraph=True), leaves(plan)
    with pytest.raises(error, match=text):
        penalty(compiled, kwargs, "q", plan).backward()


def ways_to_differentiate(plan: Plan, x: Tensor) -> dict[str, Callable[[], Any]]:
    def attend_to_itself(q: Tensor) -> Tensor:
        return attention(q, q, q, plan)

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return attend_to_itself(forward_ad.make_dual(x, torch.ones_like(x)))

    return {
        "grad": lambda: torch.func.grad(lambda q: attend_to_itself(q).sum())(x),
        "vjp": lambda: torch.func.vjp(attend_to_itself, x),
        "vmap": lambda: torch.func.vmap(attend_to_itself)(x[None]),
        "jvp": lambda: torch.func.jvp(attend_to_itself, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(attend_to_itself)(x),
        "forward mode": forward_mode,
        "vectorised jacobian": lambda: jacobian(attend_to_itself, x, vectorize=True),
        "hessian": lambda: hessian(lambda q: attend_to_itself(q).sin().sum(), x),
    }


def errors_of_all_ways(rank: int) -> list[str]:
    """The error of each way on this rank; afterwards the ranks still work together."""
    plan = plan_for(2)
    x = leaves(plan, rank)["q"].detach()
    errors = []
    for name, way in ways_to_differentiate(plan, x).items():
        try:
            way()
            errors.append(f"{name}: no error")
        except InputError as error:
            errors.append(f"{name}: {error}")
    return [*errors, by_one_rank_only(plan, x, rank)]


def by_one_rank_only(plan: Plan, x: Tensor, rank: int) -> str:
    try:
        if rank:
            torch.func.grad(lambda q: attention(q, q, q, plan).sum())(x)
        attention(x, x, x, plan)
    except InputError as error:
        return str(error)
    return "no error"


def test_other_ways_of_differentiating_raise_on_every_rank() -> None:
    (*errors, alone), other = run_ranks(
        2, errors_of_all_ways, timeout=100
    )  # torch.func imports the compiler, which takes seconds
    assert [*errors, alone] == other
    assert alone.startswith("on rank 1: attention was called under torch.func")
    texts = {"forward mode": "a dual tensor of forward-mode", "hessian": TWICE, "vectorised jacobian": "vectorize=False"}
    for line in errors:
        name = line.partition(":")[0]
        assert texts.get(name, "called under torch.func") in line, line


def test_simulated_ranks_raise_too() -> None:
    plan = plan_for(2)
    x = torch.randn(1, 6, 2, 4, dtype=torch.float64)
    with pytest.raises(InputError, match=r"called under torch\.func"):
        torch.func.vjp(lambda q: attend([Inputs(q, q, q)] * 2, plan, Options(0.5), Simulated(2))[0][0], x)
