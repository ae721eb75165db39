"""Measures how much of an attention's communication hides behind its compute, on the present links and cores.

The same program is run three ways, interleaved: as it is, without transfers, and without the kernel. If transfers and compute
overlapped perfectly, the first would take as long as the longer of the other two; if not at all, as long as both together.
`hidden` is the position between the two. Collective: every rank of the group calls it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn._validation import count, error_message, flag
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, backends
from ringattn.comm.select import transport_for
from ringattn.comm.transport import Port, Transport
from ringattn.errors import InputError
from ringattn.execution.autograd import Resident, kept_inputs, restored_inputs
from ringattn.execution.blocks import Backward, Forward
from ringattn.execution.checks import resolve_group
from ringattn.execution.engine import run
from ringattn.kernels import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.lse import Partial, accum_dtype
from ringattn.plan.plan import Plan
from ringattn.schedule.program import Message
from ringattn.sequence.mask import Band

MOST_NUMBERS = 1 << 34  # elements of q on one rank
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Overlap:
    """Median seconds of one attention call, the slowest rank's."""

    together: float
    compute: float
    transfer: float

    @property
    def hidden(self) -> float:
        """The hidden fraction: 1 when the shorter of the two costs no time, 0 when both add up."""
        shorter = min(self.compute, self.transfer)
        return min(1.0, max(0.0, (self.compute + self.transfer - self.together) / shorter)) if shorter > 0 else 1.0


class _Idle(Kernel):
    """Returns at once, with uninitialized results."""

    name = "idle"

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        lse = torch.zeros(block.q.shape[:-1], dtype=accum_dtype(block.q.dtype), device=block.q.device)
        return Partial(torch.empty_like(block.q), lse)

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        return Grads(torch.empty_like(block.q), torch.empty_like(block.k), torch.empty_like(block.v), None)


class _NullPort(Port):
    """A port that delivers zeros at once and sends nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        for message, buffer in transfers:
            if message.dst == self.rank:
                buffer.zero_()

    def wait(self, message: Message) -> Generator[None, None, None]:
        yield from ()


def overlap(plan: Plan, *, batch: int = 1, group: Group | None = None, backward: bool = False, repeats: int = 5) -> Overlap:
    """Median over `repeats` interleaved rounds of one forward (or backward) pass of `plan` with random inputs."""
    process_group, rank = resolve_group(plan, group)
    fields: dict[str, object] = {"call": "overlap"}
    problem = error_message(lambda: fields.update(_fields(plan, batch, backward, repeats)))
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu(process_group) else torch.device("cpu")
    agree(process_group, fields, problem, device=device)
    batch = int(batch)
    transport = transport_for(process_group)
    ops = _block_ops(plan, rank, batch, backward, device)
    kernel, idle = ops.kernel, _Idle()

    kept = _kept_inputs(plan, rank, batch, device, transport) if backward and plan.reuse_inputs else {}

    def timed_pass(kernel: Kernel, port: Port) -> float:
        ops.kernel = kernel
        sizes = {item: len(payload) for item, payload in kept.items()}
        resident = (
            restored_inputs(ops, sizes, (t for payload in kept.values() for t in payload)) if isinstance(ops, Backward) else {}
        )
        _synchronize(process_group, device)
        begin = perf_counter()
        transport.drive([run(plan.program(rank, backward=backward), ops, port, resident)])
        _synchronize(None, device)
        return perf_counter() - begin

    label = "backward" if backward else "forward"
    rounds = [
        (
            timed_pass(kernel, *transport.ports(label)),
            timed_pass(kernel, _NullPort(rank)),
            timed_pass(idle, *transport.ports(label)),
        )
        for _ in range(repeats + 1)
    ][1:]  # the first round warms up
    seconds = torch.tensor([median(column) for column in zip(*rounds, strict=True)], dtype=torch.float64, device=device)
    if process_group is not None:
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=process_group)
    return Overlap(*seconds.tolist())


def _fields(plan: Plan, batch: int, backward: bool, repeats: int) -> dict[str, object]:
    """The fields that all ranks agree on; raises `InputError` for invalid ones."""
    numbers = max(plan.rows(rank) for rank in range(plan.world)) * plan.heads * plan.head_dim
    return {
        "plan": plan.digest,
        "batch": count("batch", batch, InputError, most=max(1, MOST_NUMBERS // numbers)),
        "backward": flag("backward", backward, InputError),
        "repeats": count("repeats", repeats, InputError, most=MOST_REPEATS),
    }


def _block_ops(plan: Plan, rank: int, batch: int, backward: bool, device: torch.device) -> Forward | Backward:
    dtype = getattr(torch, plan.dtype)

    def random(heads: int) -> Tensor:
        return torch.randn(batch, heads, plan.rows(rank), plan.head_dim, dtype=dtype, device=device)

    q, k, v, dout = random(plan.heads), random(plan.kv_heads), random(plan.kv_heads), random(plan.heads)
    options = Options(plan.head_dim**-0.5)
    if not backward:
        return Forward(plan, rank, options, q=q, k=k, v=v)
    # A large lse keeps the random probabilities small; only their time matters, not their values.
    lse = torch.full(q.shape[:-1], 20.0, dtype=accum_dtype(dtype), device=device)
    return Backward(plan, rank, options, q=q, k=k, v=v, dout=dout, lse=lse, delta=torch.zeros_like(lse))


def _kept_inputs(plan: Plan, rank: int, batch: int, device: torch.device, transport: Transport) -> Resident:
    """The inputs that stay on this rank after a forward pass."""
    ops = _block_ops(plan, rank, batch, False, device)
    assert isinstance(ops, Forward)
    resident: Resident = {}
    (port,) = transport.ports("forward")
    transport.drive([run(plan.program(rank, backward=False), ops, port, resident)])
    return kept_inputs(ops, resident)


def _on_gpu(group: dist.ProcessGroup | None) -> bool:
    return torch.cuda.is_available() and (group is None or "cuda" in backends(group))


def _synchronize(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Wait until all earlier work on this device, and on all ranks of `group`, is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if group is not None:
        dist.barrier(group)
