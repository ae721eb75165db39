"""Every kernel that runs here x some schedules, forward and backward, against dense attention in fp64.

    torchrun --standalone --nproc-per-node N -m ringattn.selftest

It starts gloo, or NCCL where there are GPUs, one for each rank; rank 0 prints a table of what passed, and every rank exits with
status 1 if anything failed. `--kernel NAME ...` tries only those, and counts one that cannot run as a failure.
The shapes are small and awkward: lengths that nothing divides, 4 heads over 2, documents in a window, biases that hide keys.

Each kernel is first tried on one rank alone, where an error of its own stops nobody, and goes on to schedules if it ran. An
error is a norm relative to that of the exact result; rounding is far below what is allowed, a wrong mask or scale far above.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringattn.autograd import Inputs, attend
from ringattn.comm.simulated import Simulated
from ringattn.errors import RingAttnError
from ringattn.functional import attention
from ringattn.kernels import KERNELS, Options
from ringattn.kernels.pick import obstacle
from ringattn.mask import Mask, causal, documents, full, sliding_window
from ringattn.plan import Plan
from ringattn.planner import make_plan
from ringattn.runtime.init import init
from ringattn.sharding import shard

SCHEDULES = ("ring", "bidirectional_ring", "token_ring", "mesh", "all_gather", "ulysses")
LENGTH, HEADS, KV_HEADS, HEAD_DIM = 203, 4, 2, 40
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
GRADS = ("out", "dq", "dk", "dv", "dbias")


class Case(NamedTuple):
    """What is asked of every kernel and schedule."""

    name: str
    mask: Mask
    bias: bool = False
    softcap: float | None = None


CASES = (
    Case("full", full(), bias=True),
    Case("causal", causal()),
    Case("causal, softcap", causal(), softcap=2.0),
    Case("window both ways", sliding_window(31, 9)),
    Case("documents in a window", documents((0, 3, 64, 65, 150, LENGTH)) & sliding_window(40), bias=True),
)


class Example(NamedTuple):
    """Whole tensors, the same on every rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    dout: Tensor


def example(device: torch.device, dtype: torch.dtype) -> Example:
    source = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(shape, generator=source).to(device, dtype) for shape in shapes)
    bias = torch.randn(2, KV_HEADS, LENGTH, generator=source).to(device)
    bias[0, 0, 7:20] = -torch.inf
    return Example(q, k, v, bias, dout)


def dense(e: Example, case: Case) -> list[Tensor]:
    """out and gradients by plain mathematics in fp64."""
    leaves = [x.double().requires_grad_() for x in (e.q, e.k, e.v, *([e.bias] if case.bias else []))]
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = q @ k.mT / HEAD_DIM**0.5
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if case.bias:
        logits = logits + leaves[3].repeat_interleave(HEADS // KV_HEADS, 1).unsqueeze(2)
    keep = torch.tensor([[case.mask.keeps(q, k) for k in range(LENGTH)] for q in range(LENGTH)], device=q.device)
    hidden = (~keep | logits.isneginf()).detach()
    # A row that sees nothing has weights of 0 and not NaN, backward too.
    blind = hidden.all(-1, keepdim=True)
    weights = logits.masked_fill(hidden & ~blind, -torch.inf).masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = (weights @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, e.dout.double())]


def plan_for(case: Case, dtype: torch.dtype, kernel: str, world: int, schedule: str) -> Plan | None:
    """None where the schedule is none for so many ranks."""
    how: dict[str, Any] = {"schedule": schedule}
    if schedule == "ulysses":
        degree = next((n for n in range(2, HEADS + 1) if world % n == 0), None)
        if degree is None:
            return None
        how = {"schedule": "ring", "ulysses": degree}
    given: dict[str, Any] = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, mask=case.mask, kernel=kernel)
    return make_plan(LENGTH, world=world, **given, **how)


def errors(e: Example, case: Case, exact: Sequence[Tensor], plan: Plan) -> list[float]:
    """Of out and each gradient, in this rank's rows; a plan for one rank is carried out without the others."""
    alone, rank = plan.world == 1, 0 if plan.world == 1 else dist.get_rank()
    q, k, v = (shard(x, plan, rank=rank).requires_grad_() for x in (e.q, e.k, e.v))
    bias = shard(e.bias, plan, dim=2, rank=rank).requires_grad_() if case.bias else None
    if alone:
        options = Options(HEAD_DIM**-0.5, case.softcap)
        ((out, _),) = attend([Inputs(q, k, v, bias)], plan, options, Simulated(1))
    else:
        out = attention(q, k, v, plan, key_bias=bias, softcap=case.softcap)
    leaves = [q, k, v, *([] if bias is None else [bias])]
    found = [out.detach(), *torch.autograd.grad(out, leaves, shard(e.dout, plan, rank=rank))]
    wanted = [shard(x, plan, dim=1 if n < 4 else 2, rank=rank) for n, x in enumerate(exact)]
    return [_error(a, b) for a, b in zip(found, wanted, strict=True)]


def _error(found: Tensor, exact: Tensor) -> float:
    if not found.isfinite().all():
        return float("inf")
    return float(((found.double() - exact).norm() / exact.norm()).nan_to_num(0.0))


@dataclass
class Result:
    """Of one kernel, dtype and schedule: the worst error over all cases, and what failed."""

    worst: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def __str__(self) -> str:
        return self.skipped or (f"pass {self.worst:.0e}" if not self.failures else "FAIL")


def tried(e: Example, exact: Sequence[Sequence[Tensor]], kernel: str, schedule: str, device: torch.device) -> Result:
    """Every case by one kernel and schedule; ranks come to the same result. "alone" is one rank by itself."""
    result, alone = Result(), schedule == "alone"
    world = 1 if alone else dist.get_world_size()
    for case, wanted in zip(CASES, exact, strict=True):
        plan = plan_for(case, e.q.dtype, kernel, world, "ring" if alone else schedule)
        if plan is None:
            return Result(skipped="-")
        said = ""
        try:
            found = errors(e, case, wanted, plan)
        except Exception as error:
            if not alone and not isinstance(error, RingAttnError):
                raise  # the others would wait: let torchrun stop them
            found, said = [float("inf")], f"{type(error).__name__}: {error}"
        worst = torch.tensor([max(found)], device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        result.worst = max(result.worst, worst.item())
        if worst.item() > ALLOWED[e.q.dtype]:
            off = [f"{name} {error:.0e}" for name, error in zip(GRADS, found, strict=False) if error > ALLOWED[e.q.dtype]]
            result.failures.append(f"{case.name}: {said or ', '.join(off) or 'on another rank'}")
    return result


def main(kernel: tuple[str, ...] = ()) -> int:
    """Try every kernel that runs here, or only those named, and show what passed.

    Args:
        kernel: names; one that cannot run here counts as a failure.
    """
    mesh = init()
    # LOCAL_RANK's GPU has been made the current one.
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    columns = ("alone", *(SCHEDULES if mesh.size() > 1 else ()))
    table = Table(
        "kernel", "dtype", *columns, title=f"ringattn selftest: {mesh.size()} ranks, {dist.get_backend()}, {device.type}"
    )
    failures: list[str] = []
    for dtype in ALLOWED:
        e = example(device, dtype)
        exact = [dense(e, case) for case in CASES]
        for name in kernel or KERNELS:
            why = obstacle(name, device, dtype, HEAD_DIM, bias=True)
            if why is not None:
                table.add_row(name, _short(dtype), "cannot run here")
                failures += [f"{name}, {_short(dtype)}: {why}"] if kernel else []
                continue
            results: list[Result] = []
            for schedule in columns:
                result = (
                    Result(skipped="not tried") if results and results[0].failures else tried(e, exact, name, schedule, device)
                )
                failures += [f"{name}, {_short(dtype)}, {schedule}, {failure}" for failure in result.failures]
                results.append(result)
            table.add_row(name, _short(dtype), *map(str, results))
    if dist.get_rank() == 0:
        console = Console()
        console.print(table)
        for failure in failures:
            console.print(f"FAIL {failure}", markup=False, highlight=False)
        console.print(f"{len(failures)} failures" if failures else "all passed", highlight=False)
    dist.barrier()  # torchrun stops all ranks when the first exits with 1, and rank 0 has to have its say
    dist.destroy_process_group()
    return 1 if failures else 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
