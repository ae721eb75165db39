"""Formats outcomes as a plain-text table; needs torch alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ringattn.diagnostics.selftest.one_device import Outcome


def table(outcomes: Iterable[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row for each kernel and dtype, a column for each schedule and number of ranks."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for outcome in outcomes:
        column = outcome.trap or (outcome.schedule if outcome.world == 1 else f"{outcome.schedule} {outcome.world}")
        columns[column] = None
        rows.setdefault((outcome.kernel, outcome.dtype), {})[column] = str(outcome)
    return ["kernel", "dtype", *columns], [[*row, *(cells.get(c, "not tried") for c in columns)] for row, cells in rows.items()]


def transposed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """One row for each test, one column for each kernel and dtype: kernels are fewer than tests."""
    heads = ["", *(f"{row[0]} {row[1]}" for row in rows)]
    return heads, [[name, *(row[n] for row in rows)] for n, name in enumerate(columns) if n > 1]


def as_table(outcomes: Sequence[Outcome], title: str) -> str:
    """The table, then the failures, then their number."""
    columns, rows = transposed(*table(outcomes))
    widths = [max(len(line[n]) for line in (columns, *rows)) for n in range(len(columns))]
    lines = [
        title,
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (columns, *rows)),
    ]
    failures = [f"FAIL {o.kernel}, {o.dtype}, {o.schedule or o.trap} {o.world}: {f}" for o in outcomes for f in o.failures]
    return "\n".join([*(line.rstrip() for line in lines), *failures, f"{len(failures)} failures" if failures else "all passed"])
