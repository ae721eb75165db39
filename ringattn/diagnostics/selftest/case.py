"""Defines the cases of the self-test and their exact results: dense attention in fp64.

The shapes are small and awkward: lengths that nothing divides, few heads over fewer, documents in a window, biases that hide
keys. An error is a norm relative to that of the exact result; rounding is far below the tolerance, a wrong mask or scale far
above.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.plan.plan import Plan
from ringattn.planner import make_plan
from ringattn.sequence.mask import Mask, causal, documents, full, sliding_window

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 203, 4, 2, 40
# Relative to the norm of the exact result: a few thousand times the rounding of fp32, a few times that of bf16.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
RESULTS = ("out", "dq", "dk", "dv", "dbias")


class Case(NamedTuple):
    """One attention. `length` is the number of rows and keys; None for one row and one key on each rank."""

    name: str
    mask: Mask
    bias: bool = False
    softcap: float | None = None
    length: int | None = LENGTH
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    hidden: int = 0  # keys at the end that the bias hides in the second sequence, as padding on the right does

    def rows(self, world: int) -> int:
        return world if self.length is None else self.length


class Example(NamedTuple):
    """Whole tensors, the same on every rank, and the exact results: out, dq, dk, dv and, with a bias, dbias, in fp64."""

    q: Tensor  # (batch, rows, heads, head_dim)
    k: Tensor
    v: Tensor
    bias: Tensor | None  # (batch, kv_heads, rows), fp32
    dout: Tensor
    exact: Sequence[Tensor]


def cases() -> tuple[Case, ...]:
    """The cases for every kernel and schedule."""
    boundaries = (0, 3, 64, 65, 150, LENGTH)
    return (
        Case("full", full(), bias=True),
        Case("causal", causal()),
        Case("causal, softcap", causal(), softcap=2.0),
        Case("window both ways", sliding_window(31, 9)),
        Case("documents in a window", documents(boundaries) & sliding_window(40), bias=True),
    )


def traps() -> tuple[Case, ...]:
    """Cases that have broken kernels before, each with few schedules."""
    return (
        Case("300 hidden keys at the end", full(), bias=True, length=400, hidden=300),
        Case("300 hidden keys, causal", causal(), bias=True, length=400, hidden=300),
        Case("head size 256 with a bias", causal(), bias=True, head_dim=256, length=130),
        Case("head size 128 with a bias", full(), bias=True, head_dim=128, length=130),
        Case("one row on each rank", causal(), length=None),
        Case("odd rows", causal(), length=259),
        Case("9 heads over 3", causal(), heads=9, kv_heads=3, head_dim=64),
        Case("a narrow window", sliding_window(7), length=259),
    )


@lru_cache(maxsize=64)
def example(case: Case, rows: int, device: torch.device, dtype: torch.dtype) -> Example:
    source = torch.Generator().manual_seed(0)
    shapes = [(2, rows, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    q, k, v, dout = (torch.randn(shape, generator=source).to(device, dtype) for shape in shapes)
    bias = torch.randn(2, case.kv_heads, rows, generator=source).to(device) if case.bias else None
    if bias is not None and case.hidden:
        bias[1, :, rows - case.hidden :] = -torch.inf
    elif bias is not None:
        bias[0, 0, 7:20] = -torch.inf
    return Example(q, k, v, bias, dout, _dense(case, q, k, v, bias, dout))


def _dense(case: Case, *tensors: Tensor | None) -> list[Tensor]:
    """out and gradients by plain mathematics in fp64."""
    q, k, v, bias, dout = (None if x is None else x.double() for x in tensors)
    assert q is not None and k is not None and v is not None and dout is not None
    leaves = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    shared, rows = case.heads // case.kv_heads, q.shape[1]
    keys, values = (x.transpose(1, 2).repeat_interleave(shared, 1) for x in (k, v))
    logits = q.transpose(1, 2) @ keys.mT / case.head_dim**0.5
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if bias is not None:
        logits = logits + bias.repeat_interleave(shared, 1).unsqueeze(2)
    keep = _keep_matrix(case.mask, rows).to(q.device)
    hidden = (~keep | logits.isneginf()).detach()
    # A row that sees nothing has weights of 0 and not NaN, backward too.
    empty = hidden.all(-1, keepdim=True)
    weights = logits.masked_fill(hidden & ~empty, -torch.inf).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = (weights @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@lru_cache(maxsize=64)
def _keep_matrix(mask: Mask, rows: int) -> Tensor:
    """(rows, keys) bool, by the definition of a mask."""
    return torch.tensor([[mask.keeps(row, key) for key in range(rows)] for row in range(rows)])


def plan_for(case: Case, dtype: torch.dtype, kernel: str, world: int, schedule: str) -> Plan | None:
    """The plan of a case, or None where the schedule does not exist for this number of ranks."""
    how: dict[str, Any] = {"schedule": schedule}
    if schedule == "ulysses":
        degree = next((n for n in range(2, case.heads + 1) if world % n == 0), None)
        if degree is None:
            return None
        how = {"schedule": "ring", "ulysses": degree}
    how |= dict(heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim)
    return make_plan(case.rows(world), world=world, dtype=dtype, mask=case.mask, kernel=kernel, **how)
