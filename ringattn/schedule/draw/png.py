"""Draws a timeline as PNG, for reports and training logs: the same strokes as the SVG, on a matplotlib canvas.

matplotlib is imported only when a picture is drawn, and only its Agg renderer: no display, no global state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ringattn.errors import RingAttnError
from ringattn.schedule.draw.picture import COLOURS, INK, PAPER, Anchor, Grid, Point, arrow_head, paint
from ringattn.schedule.draw.timeline import timeline
from ringattn.schedule.ir import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS = 4000  # the longer side at most, so that a picture of a hundred ranks can still be opened
POINT = 0.72  # points in a pixel of a hundredth of an inch


def draw_png(schedules: Sequence[Schedule], path: str | os.PathLike[str], *, backward: bool = False) -> None:
    """Writes the picture of `draw_svg` to `path` as PNG.

    Raises:
        RingAttnError: matplotlib is not installed.
    """
    time = timeline(schedules, backward=backward)
    width, height = Grid(time).size
    figure = _figure(width / 100, height / 100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    paint(time, _Agg(axes))
    figure.savefig(path, format="png", dpi=min(160, 100 * PIXELS / max(width, height)), facecolor=PAPER)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RingAttnError("draw_png needs matplotlib, which is not installed: pip install ringattn[train]") from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


class _Agg:
    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.strokes = 0

    def box(self, corner: Point, size: Point, fill: str, title: str = "") -> None:
        from matplotlib.patches import FancyBboxPatch

        rounded = "round,pad=0,rounding_size=4"
        self.axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=rounded, facecolor=fill, linewidth=0, zorder=self._next()))

    def arrow(self, tail: Point, tip: Point, colours: Sequence[str], width: float, title: str = "") -> None:
        from matplotlib.patches import Polygon

        (x0, y0), (x1, y1) = tail, tip
        for n, colour in enumerate(colours):
            # matplotlib measures dashes in line widths
            dash = (0, (12 * (len(colours) - n) / width, 12 * n / width)) if n else "solid"
            self.axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width * POINT, linestyle=dash, zorder=self._next())
        self.axes.add_patch(Polygon(arrow_head(tail, tip), color=colours[0], linewidth=0, zorder=self._next()))

    def text(self, at: Point, text: str, size: float, colour: str = INK, anchor: Anchor = "start") -> None:
        from matplotlib.patheffects import withStroke

        sides = {"start": "left", "middle": "center", "end": "right"}
        halo = [withStroke(linewidth=3 * POINT, foreground=PAPER)] if colour in COLOURS.values() else []
        self.axes.text(*at, text, fontsize=size * POINT, color=colour, ha=sides[anchor], path_effects=halo, zorder=self._next())

    def _next(self) -> int:
        """Later strokes lie over earlier ones."""
        self.strokes += 1
        return self.strokes
