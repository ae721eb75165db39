"""Selective activation checkpointing: what a policy saves of attention is not written to afterwards, and no bit changes.

torch raises where a saved tensor has been changed in place. With `allow_cache_entry_mutation` it does not look, and uses the
changed tensor: then only equal gradients show that nothing was.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import HEADS, SCHEDULES
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringattn import Mask, Plan, causal, documents, make_plan, positions
from ringattn.autograd import Inputs, attend
from ringattn.comm.simulated import Simulated
from ringattn.kernels import Options

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LENGTH = 24
MASKS = {"causal": causal(), "documents": documents((0, 5, 11, 12, 13, 14, LENGTH))}  # of which some are one row long


def saving(operator: object) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, called: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if called is operator else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def inputs(bias: bool) -> dict[str, Tensor]:
    """Whole tensors; one key is hidden, and before it in its document there is none, so one row sees nothing."""
    source = torch.Generator().manual_seed(0)
    q, kv = ((1, LENGTH, heads, 8) for heads in HEADS["mha"])
    given = {name: torch.randn(q if name == "q" else kv, generator=source, dtype=torch.float64) for name in "qkv"}
    if bias:
        given["key_bias"] = torch.randn(1, LENGTH, generator=source, dtype=torch.float64)
        given["key_bias"][0, 0] = -torch.inf
        given["sinks"] = torch.randn(q[2], generator=source, dtype=torch.float64)
    return given


def results(plan: Plan, given: dict[str, Tensor], checkpointed: Callable[..., Any]) -> list[Tensor]:
    """out and all gradients, every rank in this process."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}

    def run(*tensors: Tensor) -> Tensor:
        whole = dict(zip(leaves, tensors, strict=True))
        sinks = whole.pop("sinks", None)
        rows = [positions(plan, rank) for rank in range(plan.world)]
        of_ranks = [Inputs(**{name: x[:, own] for name, x in whole.items()}, sinks=sinks) for own in rows]
        return torch.cat([out for out, _ in attend(of_ranks, plan, Options(0.3), Simulated(plan.world))], dim=1)

    out = checkpointed(run, *leaves.values())
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]


def plain(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_bit_changes_whatever_is_saved(schedule: str, mask: Mask) -> None:
    heads, kv_heads = HEADS["mha"]
    plan = make_plan(
        LENGTH, world=3, heads=heads, kv_heads=kv_heads, head_dim=8, dtype="float64", mask=mask,
        schedule=SCHEDULES[schedule](3), layout="zigzag",
    )  # fmt: skip
    for bias in (False, True):
        given = inputs(bias)
        expected = results(plan, given, plain)
        for operator, mutation in ((FLASH, False), (FLASH, True), (None, False)):
            contexts = partial(create_selective_checkpoint_contexts, saving(operator), allow_cache_entry_mutation=mutation)
            found = results(plan, given, partial(checkpoint, use_reentrant=False, context_fn=contexts))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (bias, operator, mutation)
