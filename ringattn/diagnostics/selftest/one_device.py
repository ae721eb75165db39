"""Runs the cases on one device: all ranks in this process, on the simulated transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.comm.simulated import Simulated
from ringattn.diagnostics.selftest.case import ALLOWED, RESULTS, Case, Example, cases, example, plan_for, traps
from ringattn.execution.autograd import Inputs, attend
from ringattn.execution.sharding import shard
from ringattn.kernels import KERNELS, Options
from ringattn.kernels.select import unsupported_reason
from ringattn.plan.plan import Plan

SCHEDULES = ("ring", "bidirectional_ring", "token_ring", "mesh", "all_gather", "ulysses")
WORLDS = (2, 4, 8)
TRAP_SCHEDULES, TRAP_WORLD = ("ring", "token_ring"), 2


class Outcome(NamedTuple):
    """The result of one kernel with one schedule over all cases, or with one trap."""

    kernel: str
    dtype: str
    world: int
    schedule: str  # "alone" for one rank
    trap: str  # "" for the cases
    worst: float  # largest relative error; inf where something raised
    failures: tuple[str, ...]
    skipped: str = ""  # why nothing was run

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        return self.skipped or (f"pass {self.worst:.0e}" if self.passed else "FAIL")


def simulated_error(
    case: Case, kernel: str, schedule: str, world: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, float] | None:
    """Relative errors of out, dq, dk, dv (and dbias) of one case over `world` simulated ranks.

    None where there is no such schedule for so many ranks. NaN and infinities count as an error of inf.
    """
    plan = plan_for(case, dtype, kernel, world, "ring" if schedule == "alone" else schedule)
    if plan is None:
        return None
    tensors = example(case, case.rows(world), device, dtype)
    actual, expected = _results(tensors, case, plan), _shards(tensors, plan)
    return {name: _error(zip(a, b, strict=True)) for name, a, b in zip(RESULTS, actual, expected, strict=False)}


def equal_bits(case: Case, kernel: str, schedule: str, world: int, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two runs in deterministic mode give the same bits, gradients included.

    On CUDA this needs CUBLAS_WORKSPACE_CONFIG=:4096:8 set before the first use of cuBLAS, as torch says.
    """
    plan = plan_for(case, dtype, kernel, world, schedule)
    assert plan is not None
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_results(example(case, case.rows(world), device, dtype), case, plan) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def simulated(
    kernels: Sequence[str] = (),
    *,
    device: torch.device,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    worlds: Iterable[int] = WORLDS,
    schedules: Iterable[str] = SCHEDULES,
) -> Iterator[Outcome]:
    """Every kernel alone, then through every schedule, then the traps; a kernel that fails alone is not run further.

    `kernels`: names; one that cannot run here counts as a failure. None for every kernel that runs here.
    """
    for dtype in dtypes:
        for kernel in kernels or kernels_here(device, dtype):
            reason = unsupported_reason(kernel, device, dtype, cases()[0].head_dim, bias=True)
            if reason is not None:
                yield Outcome(kernel, short(dtype), 1, "alone", "", float("inf"), (reason,))
                continue
            alone = _run_schedule(kernel, device, dtype, 1, "alone")
            yield alone
            if not alone.passed:
                continue
            for world in worlds:
                for schedule in schedules:
                    yield _run_schedule(kernel, device, dtype, world, schedule)
            for trap in traps():
                yield _trap(trap, kernel, device, dtype)
            yield _bits(kernel, device, dtype)


def kernels_here(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels that run on `device` in `dtype`; flex last, since its compilation takes minutes."""
    fit = [name for name in KERNELS if unsupported_reason(name, device, dtype, cases()[0].head_dim, bias=True) is None]
    return sorted(fit, key=lambda name: name == "flex")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run_schedule(kernel: str, device: torch.device, dtype: torch.dtype, world: int, schedule: str) -> Outcome:
    worst = 0.0
    failures: list[str] = []
    for case in cases():
        error, messages = _try_case(case, kernel, schedule, world, device, dtype)
        if error is None:
            return Outcome(kernel, short(dtype), world, schedule, "", 0.0, (), "-")
        worst, failures = max(worst, error), failures + messages
    return Outcome(kernel, short(dtype), world, schedule, "", worst, tuple(failures))


def _trap(case: Case, kernel: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    reason = unsupported_reason(kernel, device, dtype, case.head_dim, bias=case.bias)
    if reason is not None:  # refused before a call, which passes
        return Outcome(kernel, short(dtype), TRAP_WORLD, "", case.name, 0.0, (), "refused")
    results = [_try_case(case, kernel, schedule, TRAP_WORLD, device, dtype) for schedule in TRAP_SCHEDULES]
    failures = tuple(failure for _, messages in results for failure in messages)
    return Outcome(kernel, short(dtype), TRAP_WORLD, "", case.name, max(error or 0.0 for error, _ in results), failures)


def _bits(kernel: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    name = "equal bits twice in deterministic mode"
    failures: tuple[str, ...] = ()
    if kernel != "cudnn":  # it has no deterministic backward, which `unsupported_reason` says in that mode
        try:
            if not equal_bits(cases()[0], kernel, "token_ring", TRAP_WORLD, device=device, dtype=dtype):
                failures = (f"{name}: they differ",)
        except Exception as error:
            failures = (f"{name}: {type(error).__name__}: {error}",)
    return Outcome(kernel, short(dtype), TRAP_WORLD, "", name, 0.0, failures, "refused" if kernel == "cudnn" else "")


def _try_case(
    case: Case, kernel: str, schedule: str, world: int, device: torch.device, dtype: torch.dtype
) -> tuple[float | None, list[str]]:
    """Runs one case; returns its worst error, and messages where it is too large or something raised."""
    try:
        errors = simulated_error(case, kernel, schedule, world, device=device, dtype=dtype)
    except Exception as error:  # packages may raise any type; the others are still run
        return float("inf"), [f"{case.name}: {type(error).__name__}: {error}"]
    if errors is None:
        return None, []
    too_large = [f"{name} {error:.0e}" for name, error in errors.items() if not error <= ALLOWED[dtype]]
    return max(errors.values()), [f"{case.name}, {schedule or 'alone'}: {', '.join(too_large)}"] if too_large else []


def _results(tensors: Example, case: Case, plan: Plan) -> list[list[Tensor]]:
    """out, dq, dk, dv (and dbias), each as one tensor for every rank."""
    inputs = []
    for rank in range(plan.world):
        q, k, v = (shard(x, plan, rank=rank).requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
        inputs.append(
            Inputs(q, k, v, None if tensors.bias is None else shard(tensors.bias, plan, dim=2, rank=rank).requires_grad_())
        )
    outputs = attend(inputs, plan, Options(case.head_dim**-0.5, case.softcap), Simulated(plan.world))
    leaves = [x for i in inputs for x in i if x is not None]
    douts = [shard(tensors.dout, plan, rank=rank) for rank in range(plan.world)]
    grads = torch.autograd.grad([out for out, _ in outputs], leaves, douts)
    count = len(leaves) // plan.world
    return [[out.detach() for out, _ in outputs], *(list(grads[n::count]) for n in range(count))]


def _shards(tensors: Example, plan: Plan) -> list[list[Tensor]]:
    ranks = range(plan.world)
    return [[shard(x, plan, dim=1 if n < 4 else 2, rank=rank) for rank in ranks] for n, x in enumerate(tensors.exact)]


def _error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The norm of all differences relative to that of the exact results."""
    too_large, size = 0.0, 0.0
    for actual, exact in pairs:
        if not actual.isfinite().all():
            return float("inf")
        too_large += float((actual.double() - exact).square().sum())
        size += float(exact.square().sum())
    return float((too_large / size) ** 0.5) if size else float(too_large > 0)
