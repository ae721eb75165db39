"""Draws a timeline as text: a table of ranks and steps, and under each step the messages that depart in it.

With more than a dozen messages in a step they are counted by distance instead of listed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ringattn.schedule.draw.timeline import Timeline, letter, short, timeline
from ringattn.schedule.ir import Schedule

TEXT_WIDTH = 100


def draw_text(
    schedules: Sequence[Schedule], *, areas: Sequence[Mapping[tuple[int, int], int]] | None = None, backward: bool = False
) -> str:
    """A table of ranks and steps, and under each step the messages that depart in it; folded at 100 characters.

    `areas` (one mapping per schedule, as in `HeadGroup.areas`) adds the work of each tile in percent of the largest tile, and
    of each rank in percent of the busiest rank.
    """
    time = timeline(schedules, backward=backward)
    names = [
        f"rank {r}{' ' + letter(n) if time.head_groups > 1 else ''}" for r in range(time.world) for n in range(time.head_groups)
    ]
    row_names = ["", *names]
    if areas is not None:
        row_names = _pad([row_names, ["load", *_loads(time, areas)]])
    columns = [[f"step {step}", *_tiles(time, step, areas)] for step in range(_last_active(time) + 1 if time.world else 0)]
    in_full = max(Counter(arrow.depart for arrow in time.arrows).values(), default=0) <= 12
    traffic = [_traffic(time, step, in_full) for step in range(len(columns))]
    lines = [f"{time.title}: {time.subtitle}", *_fold(row_names, columns, traffic)]
    if time.arrows:
        explanation = "0─Q0→1: rank 0 sends Q0 to rank 1" if in_full else "3 Q→+1: three ranks send a Q one rank up"
        lines += ["", f"{explanation}, there when the next step begins; 'by 4': when step 4 does."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _fold(row_names: list[str], columns: list[list[str]], traffic: list[list[str]]) -> Iterator[str]:
    """As many columns side by side as a line has space for, their traffic below them; then the next columns."""
    while columns:
        fits = _fitting(row_names, columns, traffic)
        sends = max(map(len, traffic[:fits]))
        margin = [*row_names, *["sends"][:sends], *[""] * (sends - 1)]
        below = [rows + [""] * (sends - len(rows)) for rows in traffic[:fits]]
        yield from ["", *_pad([margin, *map(operator.add, columns[:fits], below)])]
        columns, traffic = columns[fits:], traffic[fits:]


def _last_active(time: Timeline) -> int:
    return max([box.step for box in time.boxes] + [arrow.depart for arrow in time.arrows], default=0)


def _tiles(time: Timeline, step: int, areas: Sequence[Mapping[tuple[int, int], int]] | None) -> list[str]:
    largest = max((area for head_group in areas or () for area in head_group.values()), default=0) or 1
    return [
        " ".join(
            str(box) if areas is None else f"{box} {areas[head_group].get((box.i, box.j), 0) / largest:.0%}"
            for box in time.cells.get((head_group, rank, step), ())
        )
        or "."
        for rank in range(time.world)
        for head_group in range(time.head_groups)
    ]


def _loads(time: Timeline, areas: Sequence[Mapping[tuple[int, int], int]]) -> list[str]:
    work = Counter(dict.fromkeys(range(time.world), 0))
    for box in time.boxes:
        work[box.rank] += areas[box.head_group].get((box.i, box.j), 0)
    busiest = max(work.values(), default=0) or 1
    return [
        f"{work[rank] / busiest:.0%}" if head_group == 0 else ""
        for rank in range(time.world)
        for head_group in range(time.head_groups)
    ]


def _traffic(time: Timeline, step: int, in_full: bool) -> list[str]:
    """One line for each message that departs in `step`, or one for all with equal kinds and distance."""
    numbers: Counter[str] = Counter()
    for arrow in (a for a in time.arrows if a.depart == step):
        late = f" by {arrow.arrival}" if arrow.arrival > step + 1 else ""
        if in_full:
            numbers[f"{arrow.src}─{short(arrow.label)}→{arrow.dst}{late}"] += 1
        else:
            kinds = " ".join(kind.value for kind in arrow.kinds)
            half = (time.world - 1) // 2
            up = (arrow.dst - arrow.src + half) % time.world - half
            numbers[f"{kinds}→{up:+}{late}"] += 1
    return [line if in_full else f"{number} {line}" for line, number in numbers.items()]


def _fitting(row_names: Sequence[str], columns: Sequence[Sequence[str]], traffic: Sequence[Sequence[str]]) -> int:
    """How many columns fit beside the row names; at least one."""
    width = max(map(len, [*row_names, "sends"]))
    for n, (column, sends) in enumerate(zip(columns, traffic, strict=True)):
        width += 2 + max(map(len, [*column, *sends]))
        if width > TEXT_WIDTH:
            return max(n, 1)
    return len(columns)


def _pad(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)]
