"""Counts device launches and host time per tile that are not attention, beside ring-flash-attention's own loop.

    python benchmarks/launches.py --count                  launches per tile on fake CUDA tensors, 4 simulated ranks
    python benchmarks/launches.py --host                   host microseconds per tile, with a kernel that returns at once

Neither needs a GPU. Launches are operators that reach the dispatcher and would start a kernel or a copy on the device: views
and bare allocations start none; the fused attention operators are counted apart. ringattn's own fused kernels are replaced by a
stand-in that counts as one launch each. Host time is measured on tiny CPU tensors, where only the work around the kernel is
left; "fake" is torch's process group that moves nothing, so that both libraries are timed without any backend.

ring-flash-attention must be installed for the comparison (`pip install --no-deps ring-flash-attn==0.1.8`); without it only
ringattn is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn import Plan, causal, full, make_plan, schedule
from ringattn import kernels as kernel_registry
from ringattn.comm import P2P, Port, Simulated, Transport
from ringattn.execution import Inputs, attend, run_backward, run_forward
from ringattn.kernels import Grads, Kernel, Operands, Options, Partial, Rows, accum_dtype, fused
from ringattn.schedule import Message

WORLD, ROWS, HEADS, HEAD_DIM = 4, 8192, 32, 128
# Operators that start no work on the device.
FREE = ("device", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "view")


@dataclass(frozen=True)
class Figures:
    """Per tile: launches that are not attention (or host microseconds), forward and backward."""

    schedule: str
    mask: str
    forward: float
    backward: float
    detail: dict[str, float] | None = None


class Launches(TorchDispatchMode):
    """Counts operators that would start work on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def per_tile(counted: Counter[str], tiles: int) -> dict[str, float]:
    return {name: round(n / tiles, 2) for name, n in counted.most_common() if "attention" not in name}


def plan_for(name: str, mask: str, *, kernel: str = "sdpa", rows: int = ROWS, heads: int = HEADS, dim: int = HEAD_DIM) -> Plan:
    built = {"ring": schedule.ring, "token_ring": schedule.token_ring}[name](WORLD)
    given: dict[str, Any] = dict(heads=heads, kv_heads=heads, head_dim=dim, dtype=torch.bfloat16, kernel=kernel)
    layout = "zigzag" if mask == "causal" else "contiguous"
    return make_plan(
        WORLD * rows, world=WORLD, mask=causal() if mask == "causal" else full(), schedule=built, layout=layout, **given
    )


def inputs_of(plan: Plan, device: str) -> list[Inputs]:
    def subset(rows: int, heads: int) -> Tensor:
        return torch.zeros(1, rows, heads, plan.head_dim, dtype=torch.bfloat16, device=device, requires_grad=device == "cpu")

    return [
        Inputs(subset(plan.rows(r), plan.heads), subset(plan.rows(r), plan.kv_heads), subset(plan.rows(r), plan.kv_heads))
        for r in range(plan.world)
    ]


def tiles_of(plan: Plan, rank: int | None = None) -> int:
    ranks = range(plan.world) if rank is None else [rank]
    return sum(len(step.tiles) for r in ranks for step in plan.program(r, backward=False))


def count(name: str, mask: str) -> Figures:
    """Launches per tile of both passes on fake CUDA tensors, all ranks simulated."""
    plan, outcomes = plan_for(name, mask), []
    with FakeTensorMode(allow_non_fake_inputs=True), on_a_gpu():
        inputs = inputs_of(plan, "cuda")
        for backward in (False, True):
            with Launches() as launches, fused.launches_replaced(lambda name: launches.counted.update([name])):
                options, transport = Options(HEAD_DIM**-0.5), Simulated(WORLD, copy=False)
                if not backward:  # not through autograd, which wants a real device behind a leaf
                    results, _ = run_forward(inputs, plan, options, transport, keep_inputs=False)
                else:
                    douts = [torch.empty_like(out) for out in results[::2]]
                    run_backward(inputs, results, douts, [{}] * WORLD, iter(()), plan, options, transport)
            outcomes.append(per_tile(launches.counted, tiles_of(plan)))
    totals = [round(sum(detail.values()), 2) for detail in outcomes]
    detail = {f"{way} {op}": n for way, entry in zip(("forward", "backward"), outcomes, strict=True) for op, n in entry.items()}
    forth, back = totals
    return Figures(name, mask, forth, back, detail)


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """What a machine without one is asked about the device of fake tensors."""
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        # These methods look for the device before they dispatch.
        mock.patch.object(torch.Tensor, "copy_", lambda to, source: torch.ops.aten.copy_(to, source)),
        mock.patch.object(torch.Tensor, "zero_", lambda to: torch.ops.aten.zero_(to)),
        mock.patch.object(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else torch.ops.aten.clone(x)),
        mock.patch.object(torch.Tensor, "fill_", lambda to, value: torch.ops.aten.fill_(to, value)),
    ):
        yield


class Instant(Kernel):
    """Returns the same tensors every time, at once."""

    name = "instant"

    def __init__(self) -> None:
        self.buffers: dict[Any, Any] = {}

    def segment_forward(self, block: Operands, band: Any, options: Options) -> Partial:
        key = block.q.shape
        if key not in self.buffers:
            b, h, s, d = key
            out = torch.zeros(b, s, h, d, dtype=block.q.dtype).transpose(1, 2)
            self.buffers[key] = Partial(out, torch.zeros(b, h, s, dtype=accum_dtype(out.dtype)))
        built: Partial = self.buffers[key]
        return built

    def segment_backward(self, block: Operands, rows: Rows, band: Any, options: Options) -> Grads:
        key = (block.q.shape, block.k.shape)
        if key not in self.buffers:
            shapes = [(b, s, h, d) for b, h, s, d in (t.shape for t in block[:3])]
            dq, dk, dv = (torch.zeros(shape, dtype=block.q.dtype).transpose(1, 2) for shape in shapes)
            self.buffers[key] = Grads(dq, dk, dv, None)
        built: Grads = self.buffers[key]
        return built


@contextmanager
def instant_kernel() -> Iterator[None]:
    with mock.patch.dict(kernel_registry.KERNELS, {"sdpa": Instant}):
        kernel_registry.get.cache_clear()
        yield
    kernel_registry.get.cache_clear()


class Silent(Port):
    """A port that delivers zeros at once and sends nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        for message, buffer in transfers:
            if message.dst == self.rank:
                buffer.zero_()

    def wait(self, message: Message) -> Generator[None, None, None]:
        yield from ()


class Nowhere(P2P):
    """A transport that hosts rank 1 of 4 and moves nothing: what is left is the engine."""

    def __init__(self) -> None:
        super().__init__(None)
        self.ranks = (1,)

    def ports(self, label: str) -> list[Any]:
        return [Silent(1)]


def host(name: str, rounds: int, *, group: bool = True) -> Figures:
    """Host microseconds per tile of rank 1 of 4, over a process group that moves nothing, or over no transport at all."""
    plan = plan_for(name, "full", rows=4, heads=2, dim=8)
    own = inputs_of(plan, "cpu")[1]
    with instant_kernel():
        transport: Transport = P2P(dist.group.WORLD) if group else Nowhere()
        run = lambda: attend([own], plan, Options(1.0), transport)[0][0]  # noqa: E731
        return timed(f"{name}{'' if group else ', no transport'}", rounds, tiles_of(plan, 1), run, own[:3])


def peer(rounds: int) -> Figures | None:
    """The same of ring-flash-attention's loop, with a flash-attn that returns at once."""
    sys.path.insert(0, str(Path(__file__).parent))
    from peers import flash_on_cpu, ring_flash
    from peers.base import Setting

    try:
        loop = ring_flash._part("ring_flash_attn", cast(Setting, SimpleNamespace(flops=0)))
    except (ImportError, AssertionError):
        return None
    result = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 4), None, None
    with (
        mock.patch.object(loop, "_flash_attn_forward", instantly(flash_on_cpu._flash_attn_forward, result)),
        mock.patch.object(loop, "_flash_attn_backward", instantly(flash_on_cpu._flash_attn_backward, None)),
    ):
        q, k, v = (torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        return timed("ring-flash-attention", rounds, WORLD, lambda: loop.ring_flash_attn_func(q, k, v, causal=False), (q, k, v))


def instantly(function: Any, result: Any) -> Any:
    """A function that looks like `function`, down to its parameters, and returns `result`."""
    parameters = [f"{p.name}" if p.default is p.empty else f"{p.name}=None" for p in signature(function).parameters.values()]
    built: dict[str, Any] = {"result": result}
    exec(f"def instant({', '.join(parameters)}): return result", built)
    return built["instant"]


def timed(name: str, rounds: int, tiles: int, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Figures:
    """Median host microseconds per tile, after a warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    dout = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    for _ in range(rounds):
        begin = perf_counter()
        out = forward()
        middle = perf_counter()
        torch.autograd.grad(out, leaves, dout)
        seconds[0].append(middle - begin)
        seconds[1].append(perf_counter() - middle)
    forth, back = (round(1e6 * median(subset[rounds // 5 :]) / tiles, 1) for subset in seconds)
    return Figures(name, "full", forth, back)


def fake_group() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes: list[Figures] = []
    if args.count:
        outcomes += [count(name, mask) for name in ("token_ring", "ring") for mask in ("full", "causal")]
    if args.host:
        torch.set_num_threads(1)
        fake_group()
        runs: dict[str, Callable[[], Figures | None]] = {
            "token_ring": lambda: host("token_ring", args.rounds),
            "token_ring alone": lambda: host("token_ring", args.rounds, group=False),
            "ring alone": lambda: host("ring", args.rounds, group=False),
            "ring": lambda: host("ring", args.rounds),
            "peer": lambda: peer(args.rounds),
        }
        for _ in range(3):  # interleaved: the machine may be busier in one round than in the next
            outcomes += [figures for entry in runs.values() if (figures := entry()) is not None]
    for figures in outcomes:
        print(json.dumps(asdict(figures)))
    if args.json:
        args.json.write_text(json.dumps([asdict(figures) for figures in outcomes], indent=1))


if __name__ == "__main__":
    main()
