"""What `scaling.py` has found, as a table and as a picture: time above, efficiency below, strong scaling left, weak right.

Solid with dots: measured. Open circles: what was predicted for those ranks. Dashed and marked "model": nobody has run it.
matplotlib is imported only when a picture is asked for, and only its file renderers: no display, no global state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ringattn import Plan

WORDS = {"strong": "tokens", "weak": "tokens a rank"}


@dataclass(frozen=True)
class Point:
    """One number of ranks. Seconds are of forward and of forward + backward; measured ones are None beyond the ranks at hand.

    `pairs`: (query, key) pairs that the mask keeps, which is what there is to do.
    """

    scaling: str
    length: int
    schedule: str
    ranks: int
    tokens: int
    pairs: float
    chosen: str
    measured: tuple[float, float] | None
    predicted: tuple[float, float]

    def efficiency(self, first: Point, *, measured: bool) -> float:
        """Of forward + backward, relative to `first`."""
        mine, its = ((entry.measured if measured else entry.predicted) or (0, 0) for entry in (self, first))
        return (self.pairs / (self.ranks * mine[1])) / (first.pairs / (first.ranks * its[1]))


def curves(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each curve, by ranks: first those measured, then those beyond."""
    keys = dict.fromkeys((point.scaling, point.length, point.schedule) for point in points)
    results = ([point for point in points if (point.scaling, point.length, point.schedule) == key] for key in keys)
    return [sorted(curve, key=lambda point: (point.measured is None, point.ranks)) for curve in results]


def chosen(plan: Plan) -> str:
    """The schedules of both passes; lanes of a Ulysses group differ in whose they are, which is left out."""
    passes = [
        [re.sub(r"ulysses \d+ of", "ulysses", head_group.schedule.name) for head_group in entry]
        for entry in (plan.forward, plan.backward)
    ]
    forward, backward = ("|".join(dict.fromkeys(names)) for names in passes)
    return forward if forward == backward else f"{forward}, backward {backward}"


def print_table(points: Sequence[Point], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("scaling", "schedule", "chosen"):
        table.add_column(name)
    for name in ("ranks", "tokens", "forward ms", "predicted", "fwd+bwd ms", "predicted", "efficiency", "predicted"):
        table.add_column(name, justify="right")
    for line in curves(points):
        for point in line:
            measured = point.measured or (0.0, 0.0)
            pairs = zip(measured, point.predicted, strict=True)
            table.add_row(
                f"{point.scaling} {point.length}",
                point.schedule,
                point.chosen,
                str(point.ranks),
                str(point.tokens),
                *(f"{seconds * 1e3:.4g}" for pair in pairs for seconds in pair),
                *(f"{point.efficiency(line[0], measured=which):.0%}" for which in (True, False)),
            )
        table.add_section()
    Console(width=150).print(table)


def draw(lines: Sequence[Sequence[Point]], path: Path, title: str) -> None:
    """Write the curves to `path`; its suffix says in which format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed: pip install 'ringattn[train]'") from None
    kinds = [kind for kind in WORDS if any(line[0].scaling == kind for line in lines)]
    figure = Figure(figsize=(5.2 * len(kinds), 7.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    for kind, (time, share) in zip(kinds, zip(*panels, strict=True), strict=True):
        for n, line in enumerate(line for line in lines if line[0].scaling == kind):
            _curve(time, share, line, f"C{n}")
        _label(time, f"{kind} scaling", "forward + backward, s")
        _label(share, "", "efficiency")
        share.set_ylim(0, 1.15)
        share.axhline(1, color="0.8", linewidth=1, zorder=0)
        share.set_xlabel("ranks")
        _legend(time)
    figure.savefig(path, dpi=150)


def _curve(time: Axes, share: Axes, line: Sequence[Point], color: str) -> None:
    first = line[0]
    here, beyond = ([point for point in line if (point.measured is not None) is at_hand] for at_hand in (True, False))
    name = f"{first.length:,} {WORDS[first.scaling]}, {first.schedule}"
    ranks = [point.ranks for point in here]
    time.plot(ranks, [point.measured[1] for point in here if point.measured], "o-", color=color, label=name)
    time.plot(ranks, [point.predicted[1] for point in here], "o", color=color, fillstyle="none", markersize=9)
    share.plot(ranks, [point.efficiency(first, measured=True) for point in here], "o-", color=color)
    share.plot(ranks, [p.efficiency(first, measured=False) for p in here], "o", color=color, fillstyle="none", markersize=9)
    if beyond:
        ranks = [point.ranks for point in beyond]
        efficiency = [point.efficiency(first, measured=False) for point in beyond]
        for axes, values in ((time, [point.predicted[1] for point in beyond]), (share, efficiency)):
            axes.plot(ranks, values, "--", color=color)
            axes.annotate(" model", (ranks[-1], values[-1]), color=color, fontsize=8, va="center", annotation_clip=False)


def _label(axes: Axes, title: str, value: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(value)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.margins(x=0.1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.set_yscale("log")
    handles, names = axes.get_legend_handles_labels()
    (predicted,) = axes.plot([], [], "o", color="0.4", fillstyle="none", markersize=9)
    (model,) = axes.plot([], [], "--", color="0.4")
    axes.legend([*handles, predicted, model], [*names, "predicted for these ranks", "model"], fontsize=8, frameon=False)
