"""Draws two pictures of a run: how the loss fell, and which rank computed and sent what when."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ringattn import InputError, Plan


def check_available() -> None:
    """Raise `InputError` where matplotlib is missing: at the start, not after hours of training."""
    if find_spec("matplotlib") is None:
        raise InputError("--plots needs matplotlib, which is not installed: pip install 'ringattn[train]', or pass --no-plots")


def loss_curve(metrics: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte over steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title="Training loss")
    axes.plot([m["step"] for m in metrics], [m["bits_per_byte"] for m in metrics], color="#1b6ca8", linewidth=2)
    axes.axhline(8, color="#888888", linestyle=":", linewidth=1)
    axes.annotate(
        "uniform", (1, 8), xycoords=("axes fraction", "data"), xytext=(-4, -12), textcoords="offset points", ha="right"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def schedule_timeline(plan: Plan, path: Path) -> None:
    """The plan's forward schedule, of all head groups, as PNG."""
    from ringattn.schedule.draw import draw_png

    draw_png([head_group.schedule for head_group in plan.forward], path)
