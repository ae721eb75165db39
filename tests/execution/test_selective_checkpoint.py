"""Selective activation checkpointing: tensors that a policy saves of attention are not written to later, and no bit changes.

torch raises where a saved tensor has been changed in place. With `allow_cache_entry_mutation` it does not check, and uses the
changed tensor: then only equal gradients prove that none was.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import HEADS, SCHEDULES
from spawn import run_ranks
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ringattn.execution.custom_op
from ringattn import Mask, Plan, attention, causal, documents, make_plan, positions, shard
from ringattn.comm.simulated import Simulated
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LENGTH = 24
MASKS = {"causal": causal(), "documents": documents((0, 5, 11, 12, 13, 14, LENGTH))}  # some are one row long


def saving(operator: object) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, current: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if current is operator else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def inputs(bias: bool) -> dict[str, Tensor]:
    """Whole tensors; one key is hidden, and before it in its document there is none, so one row has no key."""
    source = torch.Generator().manual_seed(0)
    q, kv = ((1, LENGTH, heads, 8) for heads in HEADS["mha"])
    named_inputs = {name: torch.randn(q if name == "q" else kv, generator=source, dtype=torch.float64) for name in "qkv"}
    if bias:
        named_inputs["key_bias"] = torch.randn(1, LENGTH, generator=source, dtype=torch.float64)
        named_inputs["key_bias"][0, 0] = -torch.inf
        named_inputs["sinks"] = torch.randn(q[2], generator=source, dtype=torch.float64)
    return named_inputs


def results(plan: Plan, named_inputs: dict[str, Tensor], checkpointed: Callable[..., Any]) -> list[Tensor]:
    """out and all gradients, every rank in this process."""
    leaves = {name: x.clone().requires_grad_() for name, x in named_inputs.items()}

    def run(*tensors: Tensor) -> Tensor:
        full = dict(zip(leaves, tensors, strict=True))
        sinks = full.pop("sinks", None)
        rows = [positions(plan, rank) for rank in range(plan.world)]
        rank_inputs = [Inputs(**{name: x[:, own] for name, x in full.items()}, sinks=sinks) for own in rows]
        return torch.cat([out for out, _ in attend(rank_inputs, plan, Options(0.3), Simulated(plan.world))], dim=1)

    out = checkpointed(run, *leaves.values())
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]


def plain(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_bit_changes_whatever_is_saved(schedule: str, mask: Mask) -> None:
    heads, kv_heads = HEADS["mha"]
    plan = make_plan(
        LENGTH, world=3, heads=heads, kv_heads=kv_heads, head_dim=8, dtype="float64", mask=mask,
        schedule=SCHEDULES[schedule](3), layout="zigzag",
    )  # fmt: skip
    for bias in (False, True):
        named_inputs = inputs(bias)
        expected = results(plan, named_inputs, plain)
        for operator, mutation in ((FLASH, False), (FLASH, True), (None, False)):
            contexts = partial(create_selective_checkpoint_contexts, saving(operator), allow_cache_entry_mutation=mutation)
            actual = results(plan, named_inputs, partial(checkpoint, use_reentrant=False, context_fn=contexts))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), (bias, operator, mutation)


def save_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def layers_on_ranks(rank: int, schedule: str, bias: bool) -> dict[str, tuple[bool, int]]:
    """By policy: whether out and gradients of two layers have the bits of a pass without it, and how often attention ran."""
    plan = make_plan(
        LENGTH,
        world=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        dtype="float64",
        mask=causal(),
        schedule=SCHEDULES[schedule](2),
        layout="zigzag",
    )
    source = torch.Generator().manual_seed(1)
    x = shard(torch.randn(1, LENGTH, 32, generator=source, dtype=torch.float64), plan)
    weights = [torch.randn(32, 64, generator=source, dtype=torch.float64) for _ in range(2)]
    more = {}
    if bias:
        hidden = torch.randn(1, LENGTH, generator=source, dtype=torch.float64)
        more = {"key_bias": shard(hidden, plan), "sinks": torch.randn(4, generator=source, dtype=torch.float64)}

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (8, 8)).split((4, 2, 2), dim=2)
        return x + attention(q, k, v, plan, **more).flatten(2)

    def both(checkpointed: Callable[..., Any], *leaves: Tensor) -> tuple[list[Tensor], int]:
        runs, forward = 0, ringattn.execution.custom_op.run_forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            return forward(*args, **kwargs)

        ringattn.execution.custom_op.run_forward = counted
        h, *weights = leaves
        for weight in weights:
            h = checkpointed(layer, h, weight)
        h.sin().sum().backward()  # on ranks that train nothing too
        ringattn.execution.custom_op.run_forward = forward
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return [h.detach(), *grads], runs

    policies = {"all": save_all, "attention": saving(torch.ops.ringattn.attention.default), "none": saving(None)}
    by_policy = {}
    for ranks in ("all ranks train", "rank 0 trains"):
        leaves = [leaf.detach().requires_grad_(ranks == "all ranks train" or rank == 0) for leaf in (x, *weights)]
        expected, _ = both(plain, *leaves)
        for name, policy in policies.items():
            contexts = partial(create_selective_checkpoint_contexts, policy)
            results, runs = both(partial(checkpoint, use_reentrant=False, context_fn=contexts), *leaves)
            by_policy[f"{name}, {ranks}"] = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), runs
    return by_policy


def four_kinds(rank: int) -> dict[str, dict[str, tuple[bool, int]]]:
    return {f"{s}, {b}": layers_on_ranks(rank, s, b) for s in ("ring", "ulysses") for b in (False, True)}


def test_a_policy_sees_attention_on_ranks_as_one_operator() -> None:
    """Saved, it does not run again, and so sends nothing again."""
    for kinds in run_ranks(2, four_kinds):
        for kind, by_policy in kinds.items():
            for case, (same, runs) in by_policy.items():
                assert same and runs == (4 if case.startswith("none") else 2), (kind, case, runs)
