"""What the stages share: all ranks of a plan in this process, dense attention in fp64, and clocks."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn import Mask, Plan, make_plan, positions
from ringattn.comm import Simulated, SimulatedPort
from ringattn.execution import Inputs, attend
from ringattn.kernels import KERNELS, Options, unsupported_reason
from ringattn.schedule import Message

SCHEDULES = ("ring", "bidirectional_ring", "token_ring", "mesh", "all_gather", "ulysses")
WANTED = ("sdpa", "reference", "cudnn", "flash", "flash2", "flash3", "flash4")
# Norms of errors relative to the exact result. Inputs are given, so what counts is rounding on the way: bf16 rounds by up to
# 2^-9 = 0.2 %, and probabilities, the result, dout and each partial that travels are rounded once, which adds up to 0.3 to
# 0.6 %; fp32 has 2^-24 and sums of some hundred terms. A wrong mask, scale or order gives errors of 10 % and more.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}

# Whether the simulated transport hands buffers over. If not it copies each message twice, once when it is sent and once when it
# arrives, which no real transport does: what is timed then has these copies in it.
HANDS_OVER = "copy" in inspect.signature(Simulated.__init__).parameters
TRANSPORT = "hands buffers over" if HANDS_OVER else "copies every message twice"


def simulated(world: int) -> Simulated:
    """All ranks in this process; messages are handed over where the library can do so."""
    return Simulated(world, **({"copy": False} if HANDS_OVER else {}))  # type: ignore[arg-type]


def plan_for(length: int, world: int, schedule: str, **given: Any) -> Plan:
    """A plan by the name of its schedule; "ulysses" is Ulysses over all ranks and nothing else."""
    how: dict[str, Any] = {"schedule": "ring", "ulysses": world} if schedule == "ulysses" else {"schedule": schedule}
    return make_plan(length, world=world, **given, **how)


def kernels_here(device: torch.device, dtype: torch.dtype, head_dim: int, *, bias: bool = False) -> tuple[list[str], list[str]]:
    """Those of `WANTED` that run here, and in words why the others do not."""
    here, why = [], []
    for name in WANTED:
        outcomes = (
            unsupported_reason(name, device, dtype, head_dim, bias=bias) if name in KERNELS else f"there is no kernel {name!r}"
        )
        here += [name] if outcomes is None else []
        why += [] if outcomes is None else [f"{name}: {outcomes}"]
    return here, why


class Example(NamedTuple):
    """Whole tensors: q and dout (batch, length, heads, dim), k and v (batch, length, kv_heads, dim), bias (batch, length)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None = None


def example(
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int = 1,
    bias: bool = False,
    seed: int = 0,
) -> Example:
    """Normal random numbers, the same on every device."""
    source = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(shape, generator=source).to(device, dtype) for shape in shapes)
    return Example(q, k, v, dout, torch.randn(batch, length, generator=source).to(device) if bias else None)


class Shards(NamedTuple):
    """The rows of every rank, as leaves of autograd, with what is needed to put them together again."""

    inputs: list[Inputs]
    douts: list[Tensor]
    rows: list[Tensor]
    keys: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for i in self.inputs for x in (i.q, i.k, i.v, i.key_bias) if x is not None]


def cut(e: Example, plan: Plan) -> Shards:
    rows = [positions(plan, rank).to(e.q.device) for rank in range(plan.world)]
    keys = [positions(plan, rank, keys=True).to(e.q.device) for rank in range(plan.world)]

    def leaf(x: Tensor, where: Tensor) -> Tensor:
        return x[:, where].detach().clone().requires_grad_()

    inputs = [
        Inputs(leaf(e.q, r), leaf(e.k, p), leaf(e.v, p), None if e.bias is None else leaf(e.bias, p))
        for r, p in zip(rows, keys, strict=True)
    ]
    return Shards(inputs, [e.dout[:, r] for r in rows], rows, keys)


def forward(plan: Plan, shards: Shards, *, softcap: float | None = None, transport: Simulated | None = None) -> list[Tensor]:
    """out of each rank, (batch, rows, heads, dim)."""
    results = attend(shards.inputs, plan, Options(plan.head_dim**-0.5, softcap), transport or simulated(plan.world))
    return [out for out, _ in results]


def backward(outs: Sequence[Tensor], shards: Shards) -> tuple[Tensor, ...]:
    """The gradients of `shards.leaves`."""
    return torch.autograd.grad(outs, shards.leaves, shards.douts)


def answer(e: Example, plan: Plan, *, softcap: float | None = None) -> list[Tensor]:
    """out, dq, dk, dv and, with a bias, dbias of the whole sequence, all ranks simulated."""
    shards = cut(e, plan)
    outs = forward(plan, shards, softcap=softcap)
    grads = backward(outs, shards)
    per_rank = len(shards.inputs[0]) - 1 if e.bias is not None else 3
    back, keys_back = torch.cat(shards.rows).argsort(), torch.cat(shards.keys).argsort()
    whole = [torch.cat([out.detach() for out in outs], dim=1)[:, back]]
    for n in range(min(per_rank, 4)):
        whole.append(torch.cat(grads[n :: min(per_rank, 4)], dim=1)[:, back if n == 0 else keys_back])
    return whole


def visible(mask: Mask, length: int, device: torch.device) -> Tensor:
    """(length, length) bool: which row sees which key, as the mask's rectangles and bands say."""
    row, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    device_facts = torch.zeros(length, length, dtype=torch.bool, device=device)
    for r in mask.rects:
        inside = (row >= r.q_start) & (row < r.q_stop) & (key >= r.k_start) & (key < r.k_stop)
        device_facts |= inside & (key - row >= r.band.left) & (key - row <= r.band.right)
    return device_facts


def dense(e: Example, keep: Tensor, *, softcap: float | None = None) -> list[Tensor]:
    """out and gradients by plain mathematics in fp64, in the order of `answer`."""
    leaves = [x.detach().double().requires_grad_() for x in (e.q, e.k, e.v, e.bias) if x is not None]
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if e.bias is not None:
        logits = logits + leaves[3][:, None, None, :]
    hidden = (~keep | logits.isneginf()).detach()
    empty = hidden.all(-1, keepdim=True)  # such rows have weights of 0 and not NaN, backward too
    weights = logits.masked_fill(hidden & ~empty, -torch.inf).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = (weights @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, e.dout.double())]


def error(outcomes: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to the norm of the exact result; infinity where something is not finite."""
    if not outcomes.isfinite().all():
        return float("inf")
    return float(((outcomes.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item())


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits every time, or an error. Not `warn_only`, with which torch's kernels stay as they are."""
    # cuBLAS needs this, which it reads when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, *actions: Callable[[], object]) -> list[float]:
    """Seconds of each of `actions`, one after another: by CUDA events, in which waiting of the device for the host counts."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for action in actions:
            action()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(actions) + 1)]
    events[0].record()
    for action, event in zip(actions, events[1:], strict=True):
        action()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def interleaved(contenders: Mapping[str, Callable[[], Sequence[float]]], rounds: int) -> dict[str, list[float]]:
    """Medians of the seconds that each contender reports of itself, after one call that does not count.

    All take their turn in each round, beginning with another one each time: a card that gets hot does so for all of them.
    """
    outcomes: dict[str, list[Sequence[float]]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    order = list(contenders)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            outcomes[name].append(contenders[name]())
    return {name: [median(part) for part in zip(*seconds, strict=True)] for name, seconds in outcomes.items()}


def often(device: torch.device, action: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Median seconds of one call among `calls` in a row, for what is too short to time alone."""

    def run() -> None:
        for _ in range(calls):
            action()

    run()
    return median(timed(device, run)[0] for _ in range(rounds)) / calls


class OneRank(Simulated):
    """Hosts one rank of many: what it sends is dropped, and what it receives is whatever lies in the buffer. So memory,
    launches and host time are exactly those of one rank, and numbers mean nothing."""

    def __init__(self, world: int, rank: int) -> None:
        super().__init__(world)
        self.rank, self.ranks = rank, range(rank, rank + 1)

    def ports(self, label: str) -> list[SimulatedPort]:
        return [_OnePort(self, {}, self.rank, label)]


class _OnePort(SimulatedPort):
    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        pass

    def wait(self, message: Message) -> Generator[None, None, None]:
        yield from ()


def one_rank(e: Example, plan: Plan, rank: int) -> tuple[Shards, OneRank]:
    """The shards of `rank` alone, and the transport that runs it."""
    shards = cut(e, plan)
    inputs, douts, rows, keys = (part[rank : rank + 1] for part in shards)
    return Shards(inputs, douts, rows, keys), OneRank(plan.world, rank)  # type: ignore[arg-type]


def tiles(plan: Plan, rank: int, *, backward: bool) -> int:
    """How many times `rank` calls the kernel in one pass."""
    return sum(len(step.tiles) for step in plan.program(rank, backward=backward))
