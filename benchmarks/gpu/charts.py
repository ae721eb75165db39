"""Draws a line chart as SVG text, with nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log2, log10

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 60, 190, 40, 50

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, lines: Mapping[str, Points], *, across: str, up: str, marks: Mapping[str, float] | None = None
) -> str:
    """`lines` by name, each (x, y) with x doubling from point to point; `marks` are horizontal lines, a goal say."""
    every = [point for points in lines.values() for point in points]
    highest = max([y for _, y in every] + list((marks or {}).values()), default=1.0) or 1.0
    tick = round_number(highest / 5)
    top = tick * ceil(highest / tick - 1e-9)
    first, last = (log2(end(x for x, _ in every)) for end in (min, max)) if every else (0.0, 1.0)
    span = (last - first) or 1.0

    def across_of(x: float) -> float:
        return float(LEFT + (log2(x) - first) / span * (WIDTH - LEFT - RIGHT))

    def up_of(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 22, title, size=14),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, anchor="middle"),
        f'<g transform="translate(16,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{text(0, 0, up, anchor="middle")}</g>',
    ]
    for n in range(round(top / tick) + 1):
        value = tick * n
        parts += [rule(up_of(value), "#dddddd"), text(LEFT - 6, up_of(value) + 4, f"{value:g}", anchor="end")]
    for x in sorted({x for x, _ in every}):
        parts.append(text(across_of(x), HEIGHT - BOTTOM + 18, short(x), anchor="middle"))
    for name, value in (marks or {}).items():
        parts += [rule(up_of(value), "#666666", "5,4"), text(WIDTH - RIGHT + 8, up_of(value) + 4, name, colour="#666666")]
    for n, (name, points) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        places = [(across_of(x), up_of(y)) for x, y in sorted(points)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{joined(places)}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(text(WIDTH - RIGHT + 70, TOP + 8 + 16 * n, name, colour=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def round_number(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** floor(log10(least))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= least * (1 - 1e-9))


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "black", size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f"<text {where}>{escape(words)}</text>"


def rule(y: float, colour: str, dashes: str = "none") -> str:
    ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-dasharray="{dashes}"/>'


def joined(places: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
