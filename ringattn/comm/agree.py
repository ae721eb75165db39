"""Nothing is sent before all ranks agree on what will be sent.

gloo and NCCL check neither size nor dtype of a message: a mismatch is silent corruption, a hang or an abort. So the first call
of each kind exchanges a fixed-size report: either "this is what I am about to do", in named fields, or "this is what is wrong
with my arguments". Ranks that all say the same go on, and remember it; otherwise every rank raises the same error, naming who
said what.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ringattn.errors import CommError, InputError, MismatchError

REPORT_BYTES = 2048

# What the ranks of a group have agreed on before; it ends with the group.
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[tuple[tuple[str, str], ...]]] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup | None, device: torch.device, fields: Mapping[str, object], problem: str | None) -> None:
    """Raise on every rank unless no rank has a problem and all have equal `fields`.

    Ranks that come with fields they have agreed on before skip the exchange; a problem is always reported, and peers that skip
    then fail when this rank leaves.
    """
    if group is None:
        if problem:
            raise InputError(problem)
        return
    known = _agreed.setdefault(group, set())
    mine = tuple((name, str(value)) for name, value in fields.items())
    if problem is None and mine in known:
        return
    reports = _exchange(group, device, f"!{problem}" if problem else "\n".join(f"{name}={value}" for name, value in mine))
    _raise_problems(reports)
    _raise_differences(reports)
    known.add(mine)


def _exchange(group: dist.ProcessGroup, device: torch.device, text: str) -> list[str]:
    data = text.encode()[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
    report = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    reports = [torch.empty_like(report) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(reports, report, group=group)
    except RuntimeError as error:
        raise CommError(
            f"rank {dist.get_rank(group)}: the ranks could not agree on this call before sending; some rank has died, or came "
            f"to another call. The backend says: {error}"
        ) from error
    return [bytes(r.tolist()).rstrip(b"\0").decode(errors="replace") for r in reports]


def _raise_problems(reports: list[str]) -> None:
    wrong = {rank: report[1:] for rank, report in enumerate(reports) if report.startswith("!")}
    if not wrong:
        return
    by_text: dict[str, list[int]] = {}
    for rank, text in wrong.items():
        by_text.setdefault(text, []).append(rank)
    raise InputError("; ".join(f"on {_ranks(ranks, len(reports))}: {text}" for text, ranks in by_text.items()))


def _raise_differences(reports: list[str]) -> None:
    parsed = [dict(line.split("=", 1) for line in report.splitlines()) for report in reports]
    for name in parsed[0]:
        by_value: dict[str, list[int]] = {}
        for rank, fields in enumerate(parsed):
            by_value.setdefault(fields.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            said = ", ".join(f"{value} on {_ranks(ranks, len(reports))}" for value, ranks in by_value.items())
            raise MismatchError(
                f"ranks disagree on {name}: {said}. All ranks must make the same call with the same plan and options"
            )


def _ranks(ranks: list[int], world: int) -> str:
    if len(ranks) == world:
        return "every rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
