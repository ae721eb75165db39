"""Runs the cases over the ranks of a process group, including links, transports and agreement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringattn.diagnostics.selftest.case import ALLOWED, RESULTS, Case, cases, example, plan_for
from ringattn.diagnostics.selftest.one_device import SCHEDULES, Outcome, _error, _run_schedule, kernels_here, short
from ringattn.errors import RingAttnError
from ringattn.execution.attention import attention
from ringattn.execution.sharding import shard
from ringattn.kernels.select import unsupported_reason
from ringattn.plan.plan import Plan


def over_ranks(kernels: Sequence[str], device: torch.device) -> list[Outcome]:
    """Runs every kernel alone on each rank, where an error stops no other rank, then with every schedule; collective.

    All ranks return the same outcomes.
    """
    outcomes: list[Outcome] = []
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in kernels or kernels_here(device, dtype):
            reason = unsupported_reason(kernel, device, dtype, cases()[0].head_dim, bias=True)
            if reason is not None:
                outcomes.append(Outcome(kernel, short(dtype), 1, "alone", "", float("inf"), (reason,)))
                continue
            alone = _run_schedule(kernel, device, dtype, 1, "alone")
            worst = _largest(alone.worst, device)
            failures = alone.failures or (("alone on another rank",) if worst > ALLOWED[dtype] else ())
            outcomes.append(alone._replace(worst=worst, failures=failures))
            if failures or dist.get_world_size() == 1:
                continue
            outcomes += [_schedule(kernel, device, dtype, schedule) for schedule in SCHEDULES]
    return outcomes


def _schedule(kernel: str, device: torch.device, dtype: torch.dtype, schedule: str) -> Outcome:
    world, worst = dist.get_world_size(), 0.0
    failures: list[str] = []
    for case in cases():
        plan = plan_for(case, dtype, kernel, world, schedule)
        if plan is None:
            return Outcome(kernel, short(dtype), world, schedule, "", 0.0, (), "-")
        message = ""
        try:
            errors = _own_errors(case, plan, device, dtype)
        except RingAttnError as error:  # raised on every rank; any other error ends the job by torchrun
            errors, message = dict.fromkeys(RESULTS, float("inf")), f"{type(error).__name__}: {error}"
        largest = _largest(max(errors.values()), device)
        worst = max(worst, largest)
        if not largest <= ALLOWED[dtype]:
            too_large = [f"{name} {error:.0e}" for name, error in errors.items() if not error <= ALLOWED[dtype]]
            failures.append(f"{case.name}: {message or ', '.join(too_large) or 'on another rank'}")
    return Outcome(kernel, short(dtype), world, schedule, "", worst, tuple(failures))


def _own_errors(case: Case, plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The errors of out and each gradient in this rank's rows."""
    e = example(case, case.rows(plan.world), device, dtype)
    q, k, v = (shard(x, plan).requires_grad_() for x in (e.q, e.k, e.v))
    bias = None if e.bias is None else shard(e.bias, plan, dim=2).requires_grad_()
    out = attention(q, k, v, plan, key_bias=bias, softcap=case.softcap)
    leaves = [q, k, v, *([] if bias is None else [bias])]
    actual = [out.detach(), *torch.autograd.grad(out, leaves, shard(e.dout, plan))]
    expected = [shard(x, plan, dim=1 if n < 4 else 2) for n, x in enumerate(e.exact)]
    return {name: _error([(a, b)]) for name, a, b in zip(RESULTS, actual, expected, strict=False)}


def _largest(error: float, device: torch.device) -> float:
    worst = torch.tensor([error], device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()
