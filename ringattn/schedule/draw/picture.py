"""Lays out a timeline as a picture, for any canvas that draws boxes, arrows and text.

A row for each rank, a column for each step. An arrow starts where its departure step begins and ends where its arrival step
begins; all steps are drawn equally wide. Beyond 8 ranks the arrows have no labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from ringattn.schedule.draw.timeline import Arrow, Timeline, letter, short
from ringattn.schedule.ir import Kind

COLOURS = {
    Kind.Q: "#0072b2",
    Kind.KV: "#d55e00",
    Kind.Q_ACC: "#009e73",
    Kind.KV_ACC: "#aa3f98",
}  # colours that colour-blind readers can distinguish
INK, MUTED, PALE, PAPER = "#1f2933", "#52606d", "#eef1f4", "#ffffff"


TILE_LEGEND = "tile, coloured by the owner of its queries"
LETTER = 5.9  # average width of a letter of the legend

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


class Canvas(Protocol):
    """Pixels, y downwards; later strokes cover earlier ones."""

    def box(self, corner: Point, size: Point, fill: str, title: str = "") -> None: ...

    def arrow(self, tail: Point, tip: Point, colours: Sequence[str], width: float, title: str = "") -> None: ...

    def text(self, at: Point, text: str, size: float, colour: str = INK, anchor: Anchor = "start") -> None: ...


@dataclass(frozen=True)
class Grid:
    """Where ranks and steps are on the canvas."""

    time: Timeline
    top: float = 92
    tile: float = 26

    @property
    def left(self) -> float:
        return 84 if self.time.head_groups < 2 else 98

    @property
    def gap(self) -> float:
        return 42 if self.time.head_groups < 2 else 62

    @property
    def crowded(self) -> bool:
        return self.time.world > 8

    @cached_property
    def column(self) -> float:
        """Wide enough for the names of all tiles that one rank computes in one step."""
        most = max((sum(len(str(box)) + 2 for box in cell) for cell in self.time.cells.values()), default=0)
        return max(76 if self.crowded else 116 if self.time.head_groups < 2 else 136, 6.6 * most + 20)

    @property
    def band(self) -> float:
        return self.tile * max(self.time.head_groups, 1)

    @property
    def bottom(self) -> float:
        return self.y(max(self.time.world, 1) - 1) + self.band

    @property
    def right(self) -> float:
        """A last step in which ranks only receive is drawn narrow."""
        last = self.time.steps - 1
        has_tiles = not self.time.arrows or any(box.step == last for box in self.time.boxes)
        return self.x(last) + (self.column if has_tiles else 56)

    @property
    def size(self) -> Point:
        legend = sum(54 + LETTER * len(text) for text in [TILE_LEGEND, *_meanings(self.time).values()])
        return max(self.right + 16, legend + 16, 32 + 10 * len(self.time.title)), self.bottom + 60

    def x(self, step: int) -> float:
        return self.left + step * self.column

    def y(self, rank: int) -> float:
        return self.top + rank * (self.band + self.gap)

    def ends(self, arrow: Arrow) -> tuple[Point, Point]:
        """Tail and tip, from edge to edge of two rows; within a step, arrivals are left of departures."""
        down = arrow.dst > arrow.src
        tail = self.x(arrow.depart) + 22, self.y(arrow.src) + self.band * down
        return tail, (self.x(arrow.arrival) + 12, self.y(arrow.dst) + self.band * (not down))

    def clear(self, y: float) -> bool:
        """Whether a line of text centred on y stays between two rows."""
        return self.band + 10 <= (y - self.top) % (self.band + self.gap) <= self.band + self.gap - 10


def paint(time: Timeline, canvas: Canvas) -> None:
    """Draws the timeline on a canvas of `Grid(time).size`: rows first, then arrows, tiles over the arrows, names on top."""
    grid = Grid(time)
    canvas.text((16, 28), time.title, 17)
    canvas.text((16, 48), time.subtitle, 12, MUTED)
    for rank in range(time.world):
        canvas.box((grid.left, grid.y(rank)), (grid.right - grid.left, grid.band), PALE)
        canvas.text((72, grid.y(rank) + grid.band / 2 + 4), f"rank {rank}", 12, anchor="end")
        for head_group in range(time.head_groups if time.head_groups > 1 else 0):
            canvas.text(
                (grid.left - 8, grid.y(rank) + (head_group + 0.5) * grid.tile + 4), letter(head_group), 11, MUTED, "end"
            )
    for step in range(time.steps):
        middle = (grid.x(step) + min(grid.x(step + 1), grid.right)) / 2
        canvas.text((middle, grid.top - 14), f"step {step}", 12, anchor="middle")
    for arrow in time.arrows:
        colours = [COLOURS[kind] for kind in arrow.kinds]
        title = f"{arrow.label}: rank {arrow.src} to rank {arrow.dst}, steps {arrow.depart} to {arrow.arrival}"
        canvas.arrow(*grid.ends(arrow), colours, 1.0 if grid.crowded else 1.6, title)
    for (head_group, rank, step), cell in time.cells.items():
        width = (grid.column - 12) / len(cell)
        for n, box in enumerate(cell):
            x, y = grid.x(step) + 6 + n * width, grid.y(rank) + head_group * grid.tile
            title = f"step {step}, rank {rank}{', head group ' + letter(head_group) if time.head_groups > 1 else ''}: {box}"
            canvas.box((x + 1, y + 1), (width - 2, grid.tile - 2), owner_colour(box.owner, time.world), title)
            canvas.text((x + width / 2, y + grid.tile / 2 + 4), str(box), 11, anchor="middle")
    for arrow, at in _names(grid):
        canvas.text(at, short(arrow.label), 10, COLOURS[arrow.kinds[0]], "middle")
    _legend(time, canvas, grid.bottom + 34)


def _names(grid: Grid) -> Iterator[tuple[Arrow, Point]]:
    """Places the name of each arrow: on it, near its tip, between rows, clear of other names; without space it has no name."""
    occupied: list[tuple[float, float, float]] = []
    short_first = sorted(
        grid.time.arrows, key=lambda arrow: abs(arrow.dst - arrow.src)
    )  # long ones have more space to choose from
    for arrow in [] if grid.crowded else short_first:
        (x0, y0), (x1, y1) = grid.ends(arrow)
        half = 3.1 * len(short(arrow.label))
        for back in (n / 40 for n in range(4, 37)):
            x, y = x1 + (x0 - x1) * back, y1 + (y0 - y1) * back
            if grid.clear(y) and not any(abs(x - u) < half + w and abs(y - v) < 12 for u, v, w in occupied):
                occupied.append((x, y, half))
                yield arrow, (x, y + 4)
                break


def _legend(time: Timeline, canvas: Canvas, y: float) -> None:
    canvas.box((16, y - 7), (28, 14), owner_colour(0, 1))
    canvas.text((52, y + 4), TILE_LEGEND, 11)
    x = 70 + LETTER * len(TILE_LEGEND)
    for kind, meaning in _meanings(time).items():
        canvas.arrow((x, y), (x + 28, y), [COLOURS[kind]], 1.6)
        canvas.text((x + 36, y + 4), meaning, 11)
        x += 54 + LETTER * len(meaning)


def _meanings(time: Timeline) -> dict[Kind, str]:
    """The kinds that travel in this pass, and what each contains."""
    forward = {Kind.Q: "queries", Kind.KV: "keys and values", Kind.Q_ACC: "partial outputs"}
    backward = {Kind.Q: "q, dout, lse, delta", Kind.KV: "keys and values", Kind.Q_ACC: "dq", Kind.KV_ACC: "dk, dv"}
    travels = {kind for arrow in time.arrows for kind in arrow.kinds}
    return {
        kind: f"{kind.value}: {meaning}"
        for kind, meaning in (backward if time.backward else forward).items()
        if kind in travels
    }


def owner_colour(owner: int, world: int) -> str:
    """Evenly spaced hues, light enough for dark names: a block that moves around the ring shows as a diagonal of one colour."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb((owner / world + 0.56) % 1, 0.8, 0.62))


def arrow_head(tail: Point, tip: Point, size: float = 7) -> tuple[Point, Point, Point]:
    """The three corners of the head."""
    (x0, y0), (x1, y1) = tail, tip
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    ux, uy = (x1 - x0) / length * size, (y1 - y0) / length * size
    return tip, (x1 - ux - uy * 0.45, y1 - uy + ux * 0.45), (x1 - ux + uy * 0.45, y1 - uy - ux * 0.45)
