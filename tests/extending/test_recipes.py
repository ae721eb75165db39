"""Each recipe of docs/extending.md adds one thing from outside: what comes of it is exact, forward and backward.

Everything is compared with dense attention in fp64. What was registered is gone after each test.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import EXACT, example, simulate, worst
from meaning import dense
from spawn import run_ranks
from torch import Tensor, nn

from ringattn import (
    InputError,
    PlanError,
    attention,
    causal,
    comm,
    documents,
    full,
    kernels,
    make_plan,
    merging,
    positions,
    schedule,
    shard,
    sliding_window,
)
from ringattn.nn import DecoderConfig, Merging, MergingDecoder, reduce_gradients
from ringattn.planner import candidates

RECIPES = Path(__file__).parents[2] / "docs/examples/extending"
REGISTRIES = {
    "schedule": (schedule, "pairwise"),
    "kernel": (kernels, "double"),
    "merge_policy": (merging, "runs"),
    "transport": (comm, "store"),
}
MODEL: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")
LENGTH, RANKS = 37, 2


def load(name: str) -> ModuleType:
    """Runs a recipe's file, which registers what it adds."""
    spec = spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def loaded(recipe: str) -> Iterator[ModuleType]:
    """What it registers is gone afterwards: ranks, too, live on for other tests."""
    try:
        yield load(recipe)
    finally:
        if recipe in REGISTRIES:
            package, name = REGISTRIES[recipe]
            package.unregister(name)


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with loaded(request.param) as module:
        yield module


def adding(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", [name], indirect=True, ids=[name])


def off(plan: Any, mask: Any, **options: Any) -> float:
    """How far outputs and gradients of `plan` are from dense attention, all ranks in this process."""
    e = example((4, 2), LENGTH, mask)
    leaves = [x.detach().requires_grad_() for x in (e.q, e.k, e.v, *options.values())]
    out, lse = dense(*leaves[:3], mask, **dict(zip(options, leaves[3:], strict=True)))
    expected = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, e.dout))
    return worst(simulate(plan, e.q, e.k, e.v, e.dout, **dict(zip(options, leaves[3:], strict=True))), expected)


# Recipes that run in one process


@adding("schedule")
@pytest.mark.parametrize("mask", [full(), causal(), documents([0, 5, 30, LENGTH]), sliding_window(6, 2)], ids=str)
def test_a_schedule(recipe: ModuleType, mask: Any) -> None:
    for world, ulysses in ((1, 1), (2, 1), (4, 1), (4, 2), (8, 1)):
        plan = make_plan(LENGTH, world=world, ulysses=ulysses, schedule="pairwise", mask=mask, layout="zigzag", **MODEL)
        assert ulysses > 1 or "pairwise" in str(plan)
        assert off(plan, mask) < EXACT


@adding("schedule")
def test_a_schedule_refuses_ranks_it_has_no_variant_for(recipe: ModuleType) -> None:
    with pytest.raises(PlanError, match="'pairwise' has no variant for 3 ranks"):
        make_plan(LENGTH, world=3, schedule="pairwise", **MODEL)
    with pytest.raises(PlanError, match="all_gather, pairwise, balanced"):
        make_plan(LENGTH, world=4, schedule="pairs", **MODEL)
    assert not any(option.named.name == "pairwise" for option in candidates(LENGTH, world=2, **MODEL))


@adding("mask")
def test_a_mask(recipe: ModuleType) -> None:
    mask = recipe.sinks_and_window(3, 7)
    sees = [[mask.keeps(q, k) for k in range(LENGTH)] for q in range(LENGTH)]
    assert sees == [[k <= q and (k < 3 or k >= q - 7) for k in range(LENGTH)] for q in range(LENGTH)]
    for name in ("ring", "token_ring", "mesh"):
        for layout in ("contiguous", "zigzag", "striped"):
            assert off(make_plan(LENGTH, world=4, schedule=name, mask=mask, layout=layout, **MODEL), mask) < EXACT
    both = mask & documents([0, 20, LENGTH])
    assert off(make_plan(LENGTH, world=3, mask=both, schedule="ring", **MODEL), both) < EXACT


@adding("kernel")
@pytest.mark.parametrize("mask", [full(), causal(), sliding_window(6, 2)], ids=str)
def test_a_kernel(recipe: ModuleType, mask: Any) -> None:
    bias = torch.randn(2, 2, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias[0, 0, :9] = -torch.inf
    plan = make_plan(LENGTH, world=4, schedule="token_ring", kernel="double", mask=mask, **MODEL)
    assert plan.kernel == "double" and off(plan, mask) < EXACT and off(plan, mask, key_bias=bias) < EXACT


@adding("kernel")
def test_a_kernel_says_what_it_cannot_compute(recipe: ModuleType) -> None:
    plan = make_plan(LENGTH, world=1, kernel="double", **MODEL)
    q, k, v = (torch.randn(1, LENGTH, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    torch.testing.assert_close(attention(q, k, v, plan), dense(q, k, v, causal())[0], rtol=0, atol=EXACT)
    with pytest.raises(InputError, match="kernel 'double' has no softcap; make the plan with kernel='sdpa'"):
        attention(q, k, v, plan, softcap=3.0)


# Recipes for real ranks


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS = torch.randint(3, (1, LENGTH), generator=torch.Generator().manual_seed(1))
CONFIG = DecoderConfig(vocab_size=8, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden_dim=24)


def decoder_loss(world: int) -> list[Any]:
    torch.manual_seed(0)
    model = MergingDecoder(CONFIG, Merging("runs", 1, 2, schedule="ring")).double()
    plan = make_plan(LENGTH, world=world, heads=2, kv_heads=1, head_dim=8, dtype="float64", schedule="ring")
    loss = model.loss(shard(TOKENS, plan), shard(TOKENS.roll(-1, 1), plan), plan)
    loss.backward()
    if world > 1:
        reduce_gradients(model.parameters())
    assert model.short is not None and max(model.short.groups.counts) < LENGTH
    return [loss.detach().numpy(), *(p.grad.numpy() for p in model.parameters() if p.grad is not None)]


def merged_attention() -> list[Any]:
    """Attention over groups that the recipe's policy decides, given back to rows; with gradients."""
    plan = make_plan(LENGTH, world=RANKS, schedule="ring", layout="zigzag", **MODEL)
    q, k, v = (shard(drawn(1, LENGTH, heads, 8, seed=n), plan).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    zeros = torch.zeros(1, plan.rows(dist.get_rank()), 4)
    merge = merging.POLICIES["runs"].decide(request(zeros, shard(TOKENS, plan), positions(plan), plan))
    short = merging.shorten(merge, plan, schedule="ring")
    out = short.unmerge(attention(*(short.merge(x) for x in (q, k, v)), short.plan, key_bias=short.key_bias))
    grads = torch.autograd.grad(out, (q, k, v), shard(drawn(1, LENGTH, 4, 8, seed=9), plan))
    return [positions(plan).numpy(), *(x.detach().numpy() for x in (out, *grads))]


def request(hidden: Tensor, tokens: Tensor, where: Tensor, plan: Any) -> merging.MergeRequest:
    numbers: dict[str, Any] = dict(factor=2, window=8, remove=0.5, threshold=None, scorer="alternate", ends=(), protect=0)
    return merging.MergeRequest(hidden, tokens, where, plan, None, lambda x: x, None, **numbers, seed=0, layer=0)


class Block(nn.Module):
    """What the integration is for: it knows torch's function and nothing of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.back = nn.Linear(16, 48).double(), nn.Linear(16, 16).double()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, **options)
        return x + self.back(out.transpose(1, 2).flatten(-2))


def integrated(recipe: ModuleType) -> list[Any]:
    block = Block()
    plan = make_plan(LENGTH, world=RANKS, heads=2, head_dim=8, dtype="float64", schedule="token_ring", layout="zigzag")
    x = shard(drawn(1, LENGTH, 16, seed=3), plan).requires_grad_()
    with recipe.ShardedAttention(plan):
        y = block(x)
        with pytest.raises(InputError, match="the plan has the mask"):
            block(x, dropout_p=0.5)
    y.backward(shard(drawn(1, LENGTH, 16, seed=4), plan))
    reduce_gradients(block.parameters())
    assert x.grad is not None
    return [positions(plan).numpy(), y.detach().numpy(), x.grad.numpy(), *(p.grad.numpy() for p in block.parameters())]


def transported(recipe: ModuleType) -> list[Any]:
    group = dist.group.WORLD
    assert group is not None
    comm.choose(group, "store")
    transport = comm.transport_for(group)
    assert isinstance(transport, recipe.StoreTransport) and comm.transport_for(group) is transport
    plan = make_plan(LENGTH, world=RANKS, schedule="token_ring", layout="zigzag", **MODEL)
    q, k, v = (shard(drawn(1, LENGTH, heads, 8, seed=n), plan).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    out = attention(q, k, v, plan)
    grads = torch.autograd.grad(out, (q, k, v), shard(drawn(1, LENGTH, 4, 8, seed=9), plan))
    assert transport.messages[0, 1] > 0
    comm.choose(group, None)  # and back: it is a choice like the others
    assert not isinstance(comm.transport_for(group), recipe.StoreTransport)
    return [positions(plan).numpy(), *(x.detach().numpy() for x in (out, *grads))]


def on_rank(rank: int) -> dict[str, list[Any]]:
    with loaded("merge_policy"):
        results = {"decoder": decoder_loss(RANKS), "merged": merged_attention()}
    with loaded("integration") as integration:
        results["integrated"] = integrated(integration)
    with loaded("transport") as transport:
        results["transported"] = transported(transport)
    return results


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, list[Any]]]:
    return run_ranks(RANKS, on_rank)


def whole(of_ranks: list[dict[str, list[Any]]], name: str, count: int = 4) -> list[Tensor]:
    """The first `count` tensors of all ranks, with rows in the order of the sequence."""
    order, *tensors = (torch.cat([torch.from_numpy(r[name][n]) for r in of_ranks], dim=min(n, 1)) for n in range(count + 1))
    return [x[:, order.argsort()] for x in tensors]


def test_a_merge_policy(of_ranks: list[dict[str, list[Any]]]) -> None:
    """Dense attention over the means of each run, of which a row is given the last that ended before it."""
    tokens = TOKENS[0].tolist()
    first = [n for n in range(LENGTH) if n == 0 or tokens[n] != tokens[n - 1]]
    mean, back = torch.zeros(len(first), LENGTH, dtype=torch.float64), torch.zeros(LENGTH, len(first), dtype=torch.float64)
    for number, (start, stop) in enumerate(zip(first, [*first[1:], LENGTH], strict=True)):
        mean[number, start:stop] = 1 / (stop - start)
        back[stop : [*first[1:], LENGTH, LENGTH][number + 1], number] = 1
    q, k, v = (drawn(1, LENGTH, heads, 8, seed=n).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    of_groups = (torch.einsum("gr,brhd->bghd", mean, x) for x in (q, k, v))
    sizes = (mean > 0).sum(1).double()
    grouped, _ = dense(*of_groups, causal(), key_bias=sizes.log()[None])
    out = torch.einsum("rg,bghd->brhd", back, grouped)
    grads = torch.autograd.grad(out, (q, k, v), drawn(1, LENGTH, 4, 8, seed=9))
    assert worst(tuple(whole(of_ranks, "merged")), (out.detach(), *grads)) < EXACT


@adding("merge_policy")
def test_a_model_takes_the_policy_by_name(recipe: ModuleType, of_ranks: list[dict[str, list[Any]]]) -> None:
    expected = [torch.from_numpy(x) for x in decoder_loss(world=1)]
    for rank in of_ranks:
        assert worst(tuple(map(torch.from_numpy, rank["decoder"])), tuple(expected)) < EXACT
    with pytest.raises(InputError, match="choose one of windows, similar, bipartite, words, gate, runs"):
        Merging("run", 1, 2).check(CONFIG)


def test_an_integration(of_ranks: list[dict[str, list[Any]]]) -> None:
    block, x = Block(), drawn(1, LENGTH, 16, seed=3).requires_grad_()
    y = block(x)
    y.backward(drawn(1, LENGTH, 16, seed=4))
    assert x.grad is not None
    assert worst(tuple(whole(of_ranks, "integrated", 2)), (y.detach(), x.grad)) < EXACT
    for rank in of_ranks:
        of_parameters = tuple(map(torch.from_numpy, rank["integrated"][3:]))
        assert worst(of_parameters, tuple(p.grad for p in block.parameters() if p.grad is not None)) < EXACT


def test_a_transport(of_ranks: list[dict[str, list[Any]]]) -> None:
    q, k, v = (drawn(1, LENGTH, heads, 8, seed=n).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    out, _ = dense(q, k, v, causal())
    grads = torch.autograd.grad(out, (q, k, v), drawn(1, LENGTH, 4, 8, seed=9))
    assert worst(tuple(whole(of_ranks, "transported")), (out.detach(), *grads)) < EXACT
