"""Nothing is sent before all ranks agree on what will be sent.

gloo and NCCL check neither size nor dtype of a message: a mismatch is silent corruption, a hang or an abort. So before a call
moves anything, ranks exchange a number that stands for "this is what I am about to do", in named fields, or for "my arguments
are wrong". Only if the numbers differ do the words behind them travel, and then every rank raises the same error, naming who
said what.

A call that moves tensors of the CPU is checked every time: eight bytes from each rank. One that moves those of a GPU is checked
the first time its fields occur, unless the caller is `strict`: reading the bytes back would stall the GPU, and where the group
has gloo too, which then carries them, ranks would still wait for each other. Ranks that part ways later are found by the
deadline of the group. Calls are counted where every one is checked, which tells a call that one rank has skipped.
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
from ringattn.faults.watchdog import transferring

REPORT_BYTES = 2048
TAG = 1  # what is said here is never taken for what a call moves

NO_AGREEMENT_IN_A_GRAPH = (
    "a CUDA graph is being captured, and ranks would have to agree on this call first, which a graph cannot repeat. Make the "
    "same call once before the capture, and both with strict=False and without check_finite where these are arguments; under "
    "torch.no_grad() if no tensor needs a gradient"
)

Fields = tuple[tuple[str, str], ...]


class Gradient(IntEnum):
    """What a rank says of its part in the backward pass of a call."""

    NONE = 0  # its tensors need no gradient, but it can take part if those of other ranks do
    NEEDED = 1
    OFF = 2  # it can take no part: gradients are off, or it runs code that was compiled without a backward pass


@dataclass
class _History:
    """What the ranks of one group have been through together."""

    calls: int = 0
    agreed: dict[tuple[Fields, Gradient], bool] = field(default_factory=dict)  # and whether a rank needs a gradient


_histories: WeakKeyDictionary[dist.ProcessGroup, _History] = WeakKeyDictionary()  # a history ends with its group


def agree(
    group: dist.ProcessGroup | None,
    fields: Mapping[str, object],
    problem: str | None = None,
    *,
    every_call: bool | None = None,
    device: torch.device | None = None,
    behind: Callable[[], Mapping[str, object]] = dict,
    gradient: Gradient = Gradient.OFF,
) -> bool:
    """Raise on every rank unless no rank has a problem and all come to the same call with equal `fields`.

    Returns whether any rank needs a gradient; then all ranks have to take part in backward.

    fields: the first says which call it is; what differs is told in this order.
    every_call: also if these fields have been agreed on before. None: yes where the call moves tensors of the CPU, else no.
    device: whose tensors the call moves; that of `device_of(group)` by default. Ranks whose GPUs meet first here are connected.
    behind: what a digest among the fields stands for, by name; asked when ranks differ, and told before the fields.
    gradient: of this rank. Ranks may differ in it, unless one needs a gradient where another has gradients off. A call in which
        no rank needs one though gradients are on is agreed on every time: the next one of its kind may be another.

    Raises:
        InputError: some rank has a problem; says which and what. Or a CUDA graph is being captured, and ranks cannot agree
            while it is.
        MismatchError: the ranks have different fields, or one of them has skipped a call, or can take no part in backward.
        CommError: a rank has died, or is busy with something else.
    """
    if group is None:
        if problem:
            raise InputError(problem)
        return gradient == Gradient.NEEDED
    history = _histories.setdefault(group, _History())
    mine = tuple((name, str(value)) for name, value in fields.items())
    if every_call is None:
        every_call = not is_asynchronous(device_of(group) if device is None else device)
    if problem is None and not every_call and (mine, gradient) in history.agreed:
        return history.agreed[mine, gradient]
    device = device_of(group) if device is None else device
    if capturing(device):  # on all ranks alike: none waits for another
        raise InputError(problem or NO_AGREEMENT_IN_A_GRAPH)
    history.calls += 1
    said = (*mine, ("number of calls so far", str(history.calls)))
    number = 0 if problem else int.from_bytes(sha256(ascii(said).encode()).digest()[:7], "big") + 1
    of_ranks = [divmod(int(n), 4) for n in _exchange(group, torch.tensor([4 * number + gradient], dtype=torch.int64))]
    if number == 0 or {n for n, _ in of_ranks} != {number}:
        told = [*said[:1], *((name, str(value)) for name, value in behind().items()), *said[1:]]
        reports = _words_of_all(group, f"!{problem}" if problem else "\n".join(f"{name}={value}" for name, value in told))
        _raise_problems(reports)
        _raise_differences(reports)
    gradients = [of_rank for _, of_rank in of_ranks]
    needed = Gradient.NEEDED in gradients
    if needed and Gradient.OFF in gradients:
        raise MismatchError(_gradients_off(gradients))
    connect(group, device)
    # What is kept must be the same on all ranks, whatever each of them has said, or some would skip what others wait for.
    if not every_call and (needed or set(gradients) == {Gradient.OFF}):
        for of_rank in (Gradient.NEEDED, Gradient.NONE) if needed else (Gradient.OFF,):
            history.agreed[mine, of_rank] = needed
    return needed


def _gradients_off(gradients: list[int]) -> str:
    need, off = ([rank for rank, said in enumerate(gradients) if said == one] for one in (Gradient.NEEDED, Gradient.OFF))
    return (
        f"ranks disagree on needs gradient: True on {ranks_named(need, len(gradients))}, and on "
        f"{ranks_named(off, len(gradients))} gradients are off (torch.no_grad(), inference mode, or a graph compiled for "
        "inputs that need none), so that it could take no part in backward. Call with gradients on, on every rank, or "
        "off on every rank; under torch.compile call q.requires_grad_() on every rank first"
    )


def _exchange(group: dist.ProcessGroup, mine: Tensor) -> list[Tensor]:
    """`mine` of every rank, on the CPU: what a rank knows goes on to one twice as far in each of log2(world) rounds."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    table = mine.new_empty(world, len(mine), device=device_of(group))  # row n is that of rank - n
    table[0] = mine
    distance = 1
    said = f"rank {rank}: the ranks could not agree on this call before sending; some rank has died, or came to another call"
    with transferring("agreeing on a call", said):
        prepare(group)
        connect(group, table.device)
        while distance < world:
            count = min(distance, world - distance)
            there, here = table[:count].clone(), table[distance : distance + count]
            to, come = (rank + distance) % world, (rank - distance) % world
            finish([sending(there, group, rank, to, TAG), receiving(here, group, rank, come, TAG)])
            distance *= 2
        rows = table.cpu()  # where a GPU has exchanged them, this waits for it
    return [rows[(rank - n) % world] for n in range(world)]


def _words_of_all(group: dist.ProcessGroup, words: str) -> list[str]:
    data = words.encode(errors="backslashreplace")[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
    reports = _exchange(group, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return [bytes(report.tolist()).rstrip(b"\0").decode(errors="replace") for report in reports]


def _raise_problems(reports: list[str]) -> None:
    by_text: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report.startswith("!"):
            by_text.setdefault(report[1:], []).append(rank)
    if by_text:
        raise InputError("; ".join(f"on {ranks_named(ranks, len(reports))}: {text}" for text, ranks in by_text.items()))


def _raise_differences(reports: list[str]) -> None:
    parsed = [dict(line.split("=", 1) for line in report.splitlines() if "=" in line) for report in reports]
    different = []
    for name in dict.fromkeys(name for fields in parsed for name in fields):
        by_value: dict[str, list[int]] = {}
        for rank, fields in enumerate(parsed):
            by_value.setdefault(fields.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            said = ", ".join(f"{value} on {ranks_named(ranks, len(reports))}" for value, ranks in by_value.items())
            different.append(f"{name}: {said}")
    if different:
        others = [one.partition(":")[0] for one in different[1:] if not different[0].startswith("call:")]
        rest = f" (and on {', '.join(others)})" if others else ""
        raise MismatchError(
            f"ranks disagree on {different[0]}{rest}. All ranks must make the same calls with the same arguments"
        )


def ranks_named(ranks: list[int], world: int) -> str:
    """`ranks` of `world` in words."""
    if len(ranks) == world:
        return "every rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
