"""Pictures of schedules: a row for each rank, a column for each step, a box for each tile, an arrow for each message.

`timeline` gathers what there is to see, as data. `draw_text` prints it for terminals; `paint` lays it out once, on any canvas with
three strokes: `draw_svg` here, `draw_png` beside it. An arrow leaves its source where its step of departure begins and ends
where its due step begins, and the picture shows the messages the engine sends: moves that share a message share an arrow.

What it does not do: it proves nothing (`check` does) and knows no bytes or seconds (`cost` does); all steps are drawn equally
wide. Beyond 8 ranks the arrows lose their labels, and in text the messages of a step are counted by distance.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Literal, NamedTuple, Protocol

from ringattn.schedule.ir import Kind, Schedule
from ringattn.schedule.program import Item, messages

COLOURS = {Kind.Q: "#0072b2", Kind.KV: "#d55e00", Kind.Q_ACC: "#009e73", Kind.KV_ACC: "#aa3f98"}  # told apart by colour-blind eyes too
INK, PALE, PAPER = "#1f2933", "#eef1f4", "#ffffff"
TEXT_WIDTH = 100


class Box(NamedTuple):
    """A tile: query block i, which belongs to rank `owner`, against key block j."""

    lane: int
    rank: int
    step: int
    i: int
    j: int
    owner: int

    def __str__(self) -> str:
        return f"Q{self.i}·K{self.j}"


class Arrow(NamedTuple):
    """A message. `kinds` are those of its items, each named once."""

    src: int
    dst: int
    depart: int
    due: int
    kinds: tuple[Kind, ...]
    label: str


@dataclass(frozen=True)
class Timeline:
    """All there is to see in one pass of some lanes."""

    name: str
    world: int
    lanes: int
    backward: bool
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]

    @cached_property
    def steps(self) -> int:
        """At least one; the last may only take in what is due."""
        return max([box.step for box in self.boxes] + [arrow.due for arrow in self.arrows], default=0) + 1

    @cached_property
    def cells(self) -> dict[tuple[int, int, int], list[Box]]:
        """The tiles of each (lane, rank, step) that has any."""
        found = defaultdict(list)
        for box in self.boxes:
            found[box.lane, box.rank, box.step].append(box)
        return dict(found)

    @property
    def title(self) -> str:
        return f"{self.name or 'no schedule'}, {_count(self.world, 'rank')}, {'backward' if self.backward else 'forward'}"

    @property
    def subtitle(self) -> str:
        return f"{_count(len(self.boxes), 'tile')} and {_count(len(self.arrows), 'message')} in {_count(self.steps, 'step')}"


def timeline(schedules: Sequence[Schedule], *, backward: bool = False) -> Timeline:
    """The tiles and messages of one pass; each schedule is a lane."""
    boxes = [Box(n, t.rank, t.step, t.i, t.j, s.q_home[t.i]) for n, s in enumerate(schedules) for t in s.tiles]
    arrows = [
        Arrow(m.src, m.dst, m.depart, m.due, tuple(dict.fromkeys(item.kind for item in m.items)), _label(m.items, len(schedules)))
        for m in messages(schedules, backward=backward)
    ]
    world = max((s.world for s in schedules), default=0)
    return Timeline(" | ".join(s.name for s in schedules), world, len(schedules), backward, tuple(boxes), tuple(arrows))


def _label(items: Sequence[Item], lanes: int) -> str:
    return " ".join(f"{item.kind.value}{item.index}{_letter(item.lane) if lanes > 1 else ''}" for item in items)


def _letter(lane: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[lane % 26]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def draw_text(
    schedules: Sequence[Schedule], *, areas: Sequence[Mapping[tuple[int, int], int]] | None = None, backward: bool = False
) -> str:
    """A table of ranks and steps, and under each step the messages that depart in it; folded to at most 100 characters a line.

    `areas` (one mapping per schedule, as in `Lane.areas`) adds each tile's work in percent of the largest one's, and each rank's
    in percent of the busiest one's.
    """
    time = timeline(schedules, backward=backward)
    names = [f"rank {r}{' ' + _letter(n) if time.lanes > 1 else ''}" for r in range(time.world) for n in range(time.lanes)]
    stub = ["", *names]
    if areas is not None:
        stub = _pad([stub, ["load", *_loads(time, areas)]])
    columns = [[f"step {step}", *_tiles(time, step, areas)] for step in range(_last_active(time) + 1)]
    in_full = max(Counter(arrow.depart for arrow in time.arrows).values(), default=0) <= 12
    traffic = [_traffic(time, step, in_full) for step in range(len(columns))]
    lines = [f"{time.title}: {time.subtitle}"]
    while columns:
        fits = _fitting(stub, columns, traffic)
        sends = max(map(len, traffic[:fits]))
        margin = [*stub, *(["sends"] if sends else []), *[""] * (sends - 1)]
        filled = [column + found + [""] * (sends - len(found)) for column, found in zip(columns[:fits], traffic[:fits], strict=True)]
        lines += ["", *_pad([margin, *filled])]
        columns, traffic = columns[fits:], traffic[fits:]
    if time.arrows:
        how = "0─Q0→1: rank 0 sends Q0 to rank 1" if in_full else "3×Q→+1: three ranks send a Q one rank up"
        lines += ["", f"{how}, there when the next step begins; 'by 4': when step 4 does."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _last_active(time: Timeline) -> int:
    return max([box.step for box in time.boxes] + [arrow.depart for arrow in time.arrows], default=0)


def _tiles(time: Timeline, step: int, areas: Sequence[Mapping[tuple[int, int], int]] | None) -> list[str]:
    largest = max((area for lane in areas or () for area in lane.values()), default=0) or 1
    return [
        " ".join(
            str(box) if areas is None else f"{box} {areas[lane].get((box.i, box.j), 0) / largest:.0%}"
            for box in time.cells.get((lane, rank, step), ())
        )
        or "."
        for rank in range(time.world)
        for lane in range(time.lanes)
    ]


def _loads(time: Timeline, areas: Sequence[Mapping[tuple[int, int], int]]) -> list[str]:
    work = Counter(dict.fromkeys(range(time.world), 0))
    for box in time.boxes:
        work[box.rank] += areas[box.lane].get((box.i, box.j), 0)
    busiest = max(work.values(), default=0) or 1
    return [f"{work[rank] / busiest:.0%}" if lane == 0 else "" for rank in range(time.world) for lane in range(time.lanes)]


def _traffic(time: Timeline, step: int, in_full: bool) -> list[str]:
    """One line for each message that departs in `step`, or one for all that carry the same over the same distance."""
    found: Counter[str] = Counter()
    for arrow in (a for a in time.arrows if a.depart == step):
        late = f" by {arrow.due}" if arrow.due > step + 1 else ""
        if in_full:
            found[f"{arrow.src}─{_short(arrow.label)}→{arrow.dst}{late}"] += 1
        else:
            kinds = " ".join(kind.value for kind in arrow.kinds)
            up = (arrow.dst - arrow.src + time.world // 2) % time.world - time.world // 2
            found[f"{kinds}→{up:+}{late}"] += 1
    return [line if in_full else f"{number}×{line}" for line, number in found.items()]


def _short(label: str) -> str:
    items = label.split()
    return label if len(items) <= 3 else f"{items[0]} {items[1]} +{len(items) - 2}"


def _fitting(stub: Sequence[str], columns: Sequence[Sequence[str]], traffic: Sequence[Sequence[str]]) -> int:
    """How many columns fit beside the stub; one always does."""
    width = max(map(len, [*stub, "sends"]))
    for n, (column, sends) in enumerate(zip(columns, traffic, strict=True)):
        width += 2 + max(map(len, [*column, *sends]))
        if width > TEXT_WIDTH:
            return max(n, 1)
    return len(columns)


def _pad(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)]


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
    left: float = 84
    top: float = 92
    tile: float = 26
    gap: float = 42

    @property
    def crowded(self) -> bool:
        return self.time.world > 8

    @cached_property
    def column(self) -> float:
        """Wide enough for the names of all tiles that one rank computes in one step."""
        most = max((sum(len(str(box)) + 2 for box in cell) for cell in self.time.cells.values()), default=0)
        return max(76 if self.crowded else 116, 6.6 * most + 20)

    @property
    def band(self) -> float:
        return self.tile * max(self.time.lanes, 1)

    @property
    def bottom(self) -> float:
        return self.y(max(self.time.world, 1) - 1) + self.band

    @property
    def size(self) -> Point:
        return max(self.x(self.time.steps) + 16, 720), self.bottom + 60

    def x(self, step: int) -> float:
        return self.left + step * self.column

    def y(self, rank: int) -> float:
        return self.top + rank * (self.band + self.gap)

    def ends(self, arrow: Arrow) -> tuple[Point, Point]:
        """From edge to edge of two rows; in a step, what comes in is left of what goes out."""
        down = arrow.dst > arrow.src
        tail = self.x(arrow.depart) + 22, self.y(arrow.src) + self.band * down
        return tail, (self.x(arrow.due) + 12, self.y(arrow.dst) + self.band * (not down))


def paint(time: Timeline, canvas: Canvas) -> None:
    """The timeline on any canvas of `Grid(time).size`: rows first, arrows over them, tiles over the arrows, names on top."""
    grid = Grid(time)
    canvas.text((16, 28), time.title, 17)
    canvas.text((16, 48), time.subtitle, 12, "#52606d")
    for rank in range(time.world):
        canvas.box((grid.left, grid.y(rank)), (grid.x(time.steps) - grid.left, grid.band), PALE)
        canvas.text((grid.left - 12, grid.y(rank) + grid.band / 2 + 4), f"rank {rank}", 12, anchor="end")
    for step in range(time.steps):
        canvas.text((grid.x(step) + grid.column / 2, grid.top - 14), f"step {step}", 12, anchor="middle")
    for arrow in time.arrows:
        colours = [COLOURS[kind] for kind in arrow.kinds]
        title = f"{arrow.label}: rank {arrow.src} to rank {arrow.dst}, steps {arrow.depart} to {arrow.due}"
        canvas.arrow(*grid.ends(arrow), colours, 1.0 if grid.crowded else 1.6, title)
    for (lane, rank, step), cell in time.cells.items():
        width = (grid.column - 12) / len(cell)
        for n, box in enumerate(cell):
            x, y = grid.x(step) + 6 + n * width, grid.y(rank) + lane * grid.tile
            title = f"step {step}, rank {rank}{', lane ' + _letter(lane) if time.lanes > 1 else ''}: {box}"
            canvas.box((x + 1, y + 1), (width - 2, grid.tile - 2), owner_colour(box.owner, time.world), title)
            canvas.text((x + width / 2, y + grid.tile / 2 + 4), str(box), 11, anchor="middle")
    for arrow in () if grid.crowded else time.arrows:
        (x0, y0), (x1, y1) = grid.ends(arrow)
        back = 15 / abs(y1 - y0)  # names stand near the tip, where few arrows meet, and clear of the row
        canvas.text((x1 + (x0 - x1) * back, y1 + (y0 - y1) * back + 4), _short(arrow.label), 10, COLOURS[arrow.kinds[0]], "middle")
    _legend(time, canvas, grid.bottom + 36)


def _legend(time: Timeline, canvas: Canvas, y: float) -> None:
    canvas.box((16, y - 9), (26, 14), owner_colour(0, max(time.world, 1)))
    x = _after(canvas, (50, y + 2), "tile, coloured by the home of its queries")
    meaning = {
        Kind.Q: "q, dout, lse, delta" if time.backward else "queries",
        Kind.KV: "keys and values",
        Kind.Q_ACC: "dq" if time.backward else "partial outputs",
        Kind.KV_ACC: "dk, dv",
    }
    for kind in (k for k in Kind if any(k in arrow.kinds for arrow in time.arrows)):
        canvas.arrow((x, y - 2), (x + 28, y - 2), [COLOURS[kind]], 1.6)
        x = _after(canvas, (x + 36, y + 2), f"{kind.value}: {meaning[kind]}")


def _after(canvas: Canvas, at: Point, text: str) -> float:
    canvas.text(at, text, 11)
    return at[0] + 5.9 * len(text) + 18


def owner_colour(owner: int, world: int) -> str:
    """Evenly spaced hues, light enough for dark names: what goes round the ring shows as a slant of one colour."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb((owner / world + 0.56) % 1, 0.8, 0.62))


def arrow_head(tail: Point, tip: Point, size: float = 7) -> tuple[Point, Point, Point]:
    """The three corners of the head."""
    (x0, y0), (x1, y1) = tail, tip
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    ux, uy = (x1 - x0) / length * size, (y1 - y0) / length * size
    return tip, (x1 - ux - uy * 0.45, y1 - uy + ux * 0.45), (x1 - ux + uy * 0.45, y1 - uy - ux * 0.45)


def draw_svg(schedules: Sequence[Schedule], *, backward: bool = False) -> str:
    """A picture that needs nothing else: no script, no style sheet, no font file. Pointing at a tile or arrow names it."""
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
        halo = f'stroke="{PAPER}" stroke-width="3" stroke-linejoin="round" paint-order="stroke"' if colour in COLOURS.values() else ""
        place = f'x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place} {halo}>{escape(text)}</text>")
