"""Gradients that only some ranks need: all ranks take part in backward, and the gradients are those of one process."""

import pytest
import torch
from spawn import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringattn import MismatchError, Plan, attention, causal, make_plan, shard, unshard
from ringattn.comm import consistency as agree

SCHEDULES = [("ring", 1), ("token_ring", 1), ("ring", 2)]  # in the last, inputs are resident away from their owners


def plans() -> list[Plan]:
    arguments = dict(world=2, heads=2, head_dim=4, dtype="float64", mask=causal(), layout="contiguous")
    return [make_plan(10, **arguments, schedule=name, ulysses=ulysses) for name, ulysses in SCHEDULES]


def full_tensor() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 10, 2, 4, dtype=torch.float64)


def layers(x: Tensor, plan: Plan) -> Tensor:
    """Two frozen layers: in the second, what every rank has depends on what rank 0 trains."""
    return attention(y := attention(x, x, x, plan) + x, y, y, plan)


def projected(rank: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """This rank's rows and the parameter, which only rank 0's rows go through: an image before frozen text."""
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = shard(full_tensor(), plan, rank=rank)
    return (x * scale if rank == 0 else x), scale


def on_ranks(rank: int) -> list[list[float]]:
    """scale.grad on this rank, for every plan and form."""
    grads = []
    for plan in plans():
        for form in (layers, lambda x, plan: checkpoint(layers, x, plan, use_reentrant=False)):
            x, scale = projected(rank, plan)
            form(x, plan).sin().sum().backward()
            grads.append([] if scale.grad is None else scale.grad.tolist())
    return grads


def in_one_process() -> list[float]:
    """The same in one process."""
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = full_tensor()
    x = torch.cat([x[:, :5] * scale, x[:, 5:]], dim=1)
    plan = make_plan(10, world=1, heads=2, head_dim=4, dtype="float64", mask=causal())
    layers(x, plan).sin().sum().backward()
    assert scale.grad is not None
    return list(scale.grad.tolist())


def test_a_parameter_on_one_rank_has_the_gradient_of_one_process() -> None:
    with_parameter, without = run_ranks(2, on_ranks)
    for grad in with_parameter:
        assert grad == pytest.approx(in_one_process(), rel=1e-12)  # fp64; a few dozen terms
    assert not any(without), "x of the other rank is frozen and gets no gradient"


def agreed_once(rank: int) -> list[int]:
    """Exchanges of each of these calls, where known calls need none; the ranks must not wait for each other."""
    plan, exchanged = plans()[0], []
    original = agree._exchange
    agree._exchange = lambda *arguments: (exchanged.append(1), original(*arguments))[1]
    counts = []
    x = shard(full_tensor(), plan, rank=rank)
    for needing in ([], [0], [0], [1], [0, 1], [], []):  # the ranks that need a gradient
        exchanged.clear()
        out = attention(x.clone().requires_grad_(rank in needing), x, x, plan, strict=False)
        if needing:
            out.sum().backward()
        counts.append(len(exchanged))
    with torch.no_grad():
        for _ in range(2):
            exchanged.clear()
            assert not attention(x, x, x, plan, strict=False).requires_grad
            counts.append(len(exchanged))
    return counts


def test_known_calls_need_no_agreement_whichever_rank_needs_a_gradient() -> None:
    """Until one rank needs a gradient the next call may be the first that does, so the first two are agreed on."""
    for counts in run_ranks(2, agreed_once):
        assert counts == [1, 1, 0, 0, 0, 0, 0, 1, 0]


def cannot_take_part(rank: int) -> list[str]:
    """The errors where rank 1 has no backward to take part in; afterwards the ranks still work together."""
    plan, errors = plans()[0], []
    x = shard(full_tensor(), plan, rank=rank)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)

    def call(mode: str) -> Tensor:
        q = x.clone().requires_grad_(rank == 0)
        if mode == "compiled":
            return compiled(q, x, x, plan)
        with torch.no_grad() if rank and mode == "no_grad" else torch.inference_mode(rank == 1 and mode == "inference"):
            return attention(q, x, x, plan)

    for mode in ("no_grad", "inference", "compiled"):
        try:
            call(mode)
            errors.append(f"{mode}: no error")
        except MismatchError as error:
            errors.append(str(error))
    attention(x, x, x, plan)
    return errors


def test_a_rank_that_cannot_take_part_is_named_with_a_hint() -> None:
    errors, other = run_ranks(2, cannot_take_part)
    assert errors == other and len(errors) == 3
    for text in errors:
        assert text.startswith("ranks disagree on needs gradient: True on rank 0, and on rank 1 gradients are off"), text
        assert "q.requires_grad_() on every rank" in text


def gathered(rank: int) -> list[list[float]]:
    """Gradients through `unshard` of rank 0's rows alone, and the second derivative by them."""
    plan = plans()[0]
    x = shard(full_tensor(), plan, rank=rank).requires_grad_(rank == 0)
    y = unshard(x, plan)
    assert y.requires_grad
    weight = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) * (rank + 1)
    (y * weight).sum().backward()
    first = [] if x.grad is None else x.grad.flatten().tolist()

    x = shard(full_tensor(), plan, rank=rank).requires_grad_()
    (grad,) = torch.autograd.grad((unshard(x, plan).square() * (rank + 1)).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * grad.detach().sin()).sum(), x)
    return [first, second.flatten().tolist()]


def test_unshard_too_and_any_number_of_times() -> None:
    (first, second0), (no_gradient, second1) = run_ranks(2, gathered)
    assert no_gradient == [] and first == [3.0 * n for n in range(40)]  # 1 and 2 times, summed over ranks
    x = full_tensor().requires_grad_()
    (grad,) = torch.autograd.grad((3 * x.square()).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * grad.detach().sin()).sum(), x)
    assert [*second0, *second1] == pytest.approx(second.flatten().tolist(), rel=1e-12)
