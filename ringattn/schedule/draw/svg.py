"""Draws a timeline as SVG: one string, no dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ringattn.schedule.draw.picture import COLOURS, INK, PAPER, Anchor, Grid, Point, arrow_head, paint
from ringattn.schedule.draw.timeline import timeline
from ringattn.schedule.ir import Schedule


def draw_svg(schedules: Sequence[Schedule], *, backward: bool = False) -> str:
    """A self-contained picture: no script, style sheet or font file. Pointing at a tile or arrow shows its name."""
    time = timeline(schedules, backward=backward)
    width, height = Grid(time).size
    canvas = _Svg()
    paint(time, canvas)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    font = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\""
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return "\n".join([f"{head} {font}>", f"<title>{escape(time.title)}</title>", paper, *canvas.parts, "</svg>", ""])


class _Svg:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, corner: Point, size: Point, fill: str, title: str = "") -> None:
        (x, y), (width, height) = corner, size
        shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" fill="{fill}"/>'
        self.parts.append(f'<g class="tile"><title>{escape(title)}</title>{shape}</g>' if title else shape)

    def arrow(self, tail: Point, tip: Point, colours: Sequence[str], width: float, title: str = "") -> None:
        line = f'<path d="M{tail[0]:.1f} {tail[1]:.1f}L{tip[0]:.1f} {tip[1]:.1f}" stroke-width="{width}"'
        dashes = [f' stroke-dasharray="{12 * (len(colours) - n)} {12 * n}"' if n else "" for n in range(len(colours))]
        shafts = "".join(f'{line} stroke="{colour}"{dash}/>' for colour, dash in zip(colours, dashes, strict=True))
        head = "L".join(f"{x:.1f} {y:.1f}" for x, y in arrow_head(tail, tip))
        shape = f'{shafts}<path d="M{head}Z" fill="{colours[0]}"/>'
        self.parts.append(f'<g class="message"><title>{escape(title)}</title>{shape}</g>' if title else f"<g>{shape}</g>")

    def text(self, at: Point, text: str, size: float, colour: str = INK, anchor: Anchor = "start") -> None:
        halo = (
            f'stroke="{PAPER}" stroke-width="3" stroke-linejoin="round" paint-order="stroke"'
            if colour in COLOURS.values()
            else ""
        )
        place = f'x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place} {halo}>{escape(text)}</text>")
