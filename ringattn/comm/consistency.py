"""Checks that all ranks make the same call with the same arguments before anything is sent.

gloo and NCCL check neither size nor dtype of a message: a mismatch is silent corruption, a hang or an abort. So before a call
moves anything, ranks exchange a hash of the call's named fields, or 0 if their arguments are invalid. Only if the numbers
differ do ranks exchange the fields as text, and then every rank raises the same error, naming the values of each rank.

A call that moves CPU tensors is checked every time: eight bytes from each rank. A call that moves GPU tensors is checked the
first time its fields occur, unless the caller is `strict`: reading the bytes back would stall the GPU, and where the group also
has gloo, which then carries them, ranks would still wait for each other. Ranks that diverge later are found by the deadline of
the group. Where every call is checked, calls are counted, which detects a call that one rank has skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import sha256
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm.gloo_duplex import connect, finish, prepare, receiving, sending
from ringattn.comm.process_group import capturing, device_of, is_asynchronous
from ringattn.errors import InputError, MismatchError
from ringattn.faults.watchdog import comm_errors

REPORT_BYTES = 2048
TAG = 1  # keeps messages of the agreement apart from the transfers of a call

NO_AGREEMENT_IN_A_GRAPH = (
    "a CUDA graph is being captured, and ranks would have to agree on this call first, which a graph cannot repeat. Make the "
    "same call once before the capture, and both with strict=False and without check_finite where these are arguments; under "
    "torch.no_grad() if no tensor needs a gradient"
)

Fields = tuple[tuple[str, str], ...]


class Gradient(IntEnum):
    """Whether a rank takes part in the backward pass of a call."""

    NONE = 0  # its tensors need no gradient, but it can take part if tensors of other ranks do
    NEEDED = 1
    OFF = 2  # it cannot take part: gradients are off, or it runs code that was compiled without a backward pass


@dataclass
class _History:
    """The calls that the ranks of one group have agreed on."""

    calls: int = 0
    agreed: dict[tuple[Fields, Gradient], bool] = field(default_factory=dict)  # value: whether a rank needs a gradient


_histories: WeakKeyDictionary[dist.ProcessGroup, _History] = WeakKeyDictionary()  # a history ends with its group


def agree(
    group: dist.ProcessGroup | None,
    fields: Mapping[str, object],
    problem: str | None = None,
    *,
    every_call: bool | None = None,
    device: torch.device | None = None,
    details: Callable[[], Mapping[str, object]] = dict,
    gradient: Gradient = Gradient.OFF,
) -> bool:
    """Check that no rank has a problem and that all ranks make the same call with equal `fields`; else raise on every rank.

    Args:
        group: the ranks that make the call; None for a single process.
        fields: arguments by name; the first names the call. Errors report differences in this order.
        problem: what is wrong with this rank's arguments, or None.
        every_call: check also if these fields have been agreed on before. None: yes where the call moves CPU tensors, else no.
        device: of the tensors that the call moves; `device_of(group)` by default. The first call on GPUs connects them.
        details: returns the values behind a digest in `fields`, by name; called when ranks differ, reported before the fields.
        gradient: of this rank. Ranks may differ in it, unless one needs a gradient where another has gradients off. A call in
            which no rank needs one though gradients are on is checked every time: the next call may need one.

    Returns:
        Whether any rank needs a gradient; then all ranks have to take part in backward.

    Raises:
        InputError: a rank has a problem; the error names the rank and the problem. Or a CUDA graph is being captured, in which
            ranks cannot agree.
        MismatchError: ranks have different fields, one of them has skipped a call, or cannot take part in backward.
        CommError: a rank has died, or is busy with something else.
    """
    if group is None:
        if problem:
            raise InputError(problem)
        return gradient == Gradient.NEEDED
    history = _histories.setdefault(group, _History())
    own_fields = tuple((name, str(value)) for name, value in fields.items())
    if every_call is None:
        every_call = not is_asynchronous(device_of(group) if device is None else device)
    if problem is None and not every_call and (own_fields, gradient) in history.agreed:
        return history.agreed[own_fields, gradient]
    device = device_of(group) if device is None else device
    if capturing(device):  # so it is on all ranks, and none waits for another
        raise InputError(problem or NO_AGREEMENT_IN_A_GRAPH)
    history.calls += 1
    named_fields = (*own_fields, ("number of calls so far", str(history.calls)))
    number = 0 if problem else int.from_bytes(sha256(ascii(named_fields).encode()).digest()[:7], "big") + 1
    by_rank = [divmod(int(n), 4) for n in _exchange(group, torch.tensor([4 * number + gradient], dtype=torch.int64))]
    if number == 0 or {n for n, _ in by_rank} != {number}:
        reported = [*named_fields[:1], *((name, str(value)) for name, value in details().items()), *named_fields[1:]]
        reports = _exchange_text(group, f"!{problem}" if problem else "\n".join(f"{name}={value}" for name, value in reported))
        _raise_problems(reports)
        _raise_differences(reports)
    gradients = [own for _, own in by_rank]
    needed = Gradient.NEEDED in gradients
    if needed and Gradient.OFF in gradients:
        raise MismatchError(_gradients_off(gradients))
    connect(group, device)
    # The stored entry must be the same on all ranks, or some would skip an agreement that others wait for.
    if not every_call and (needed or set(gradients) == {Gradient.OFF}):
        for own in (Gradient.NEEDED, Gradient.NONE) if needed else (Gradient.OFF,):
            history.agreed[own_fields, own] = needed
    return needed


def _gradients_off(gradients: list[int]) -> str:
    need, off = ([rank for rank, own in enumerate(gradients) if own == state] for state in (Gradient.NEEDED, Gradient.OFF))
    return (
        f"ranks disagree on needs gradient: True on {format_ranks(need, len(gradients))}, and on "
        f"{format_ranks(off, len(gradients))} gradients are off (torch.no_grad(), inference mode, or a graph compiled for "
        "inputs that need none), so it cannot take part in backward. Call with gradients on, on every rank, or "
        "off on every rank; under torch.compile call q.requires_grad_() on every rank first"
    )


def _exchange(group: dist.ProcessGroup, own_row: Tensor) -> list[Tensor]:
    """Gather `own_row` of every rank on the CPU, in log2(world) rounds of doubling distance."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    table = own_row.new_empty(world, len(own_row), device=device_of(group))  # row n is that of rank - n
    table[0] = own_row
    distance = 1
    failure = f"rank {rank}: the ranks could not agree on this call before sending; a rank has died or makes another call"
    with comm_errors("agreeing on a call", failure):
        prepare(group)
        connect(group, table.device)
        while distance < world:
            count = min(distance, world - distance)
            outgoing, incoming = table[:count].clone(), table[distance : distance + count]
            dst, src = (rank + distance) % world, (rank - distance) % world
            finish([sending(outgoing, group, rank, dst, TAG), receiving(incoming, group, rank, src, TAG)])
            distance *= 2
        rows = table.cpu()  # waits for the GPU where one has exchanged them
    return [rows[(rank - n) % world] for n in range(world)]


def _exchange_text(group: dist.ProcessGroup, text: str) -> list[str]:
    data = text.encode(errors="backslashreplace")[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
    reports = _exchange(group, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return [bytes(report.tolist()).rstrip(b"\0").decode(errors="replace") for report in reports]


def _raise_problems(reports: list[str]) -> None:
    by_text: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report.startswith("!"):
            by_text.setdefault(report[1:], []).append(rank)
    if by_text:
        raise InputError("; ".join(f"on {format_ranks(ranks, len(reports))}: {text}" for text, ranks in by_text.items()))


def _raise_differences(reports: list[str]) -> None:
    parsed = [dict(line.split("=", 1) for line in report.splitlines() if "=" in line) for report in reports]
    different = []
    for name in dict.fromkeys(name for fields in parsed for name in fields):
        by_value: dict[str, list[int]] = {}
        for rank, fields in enumerate(parsed):
            by_value.setdefault(fields.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {format_ranks(ranks, len(reports))}" for value, ranks in by_value.items())
            different.append(f"{name}: {values}")
    if different:
        others = [text.partition(":")[0] for text in different[1:] if not different[0].startswith("call:")]
        also = f" (and on {', '.join(others)})" if others else ""
        raise MismatchError(
            f"ranks disagree on {different[0]}{also}. All ranks must make the same calls with the same arguments"
        )


def format_ranks(ranks: list[int], world: int) -> str:
    """Format `ranks` of `world` as text: "every rank", "rank 3" or "ranks 0, 2"."""
    if len(ranks) == world:
        return "every rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
