"""Tests drawings: each tile once in its cell, each message once, between its own ranks and steps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from ringattn.errors import RingAttnError
from ringattn.schedule import (
    BufferLimits,
    Kind,
    Move,
    Schedule,
    Tile,
    bidirectional_ring,
    make,
    prune,
    ring,
    side_by_side,
    token_ring,
)
from ringattn.schedule.draw import draw_png, draw_svg, draw_text, timeline
from ringattn.schedule.draw.picture import COLOURS, Grid, Point, arrow_head, owner_colour, paint
from ringattn.schedule.draw.text import TEXT_WIDTH
from ringattn.schedule.program import messages

HOW = "0─Q0→1: rank 0 sends Q0 to rank 1, there when the next step begins; 'by 4': when step 4 does."

RING = f"""\
ring, 3 ranks, forward: 9 tiles and 6 messages in 3 steps

        step 0   step 1   step 2
rank 0  Q0·K0    Q0·K2    Q0·K1
rank 1  Q1·K1    Q1·K0    Q1·K2
rank 2  Q2·K2    Q2·K1    Q2·K0
sends   0─KV0→1  1─KV0→2
        1─KV1→2  2─KV1→0
        2─KV2→0  0─KV2→1

{HOW}
"""

RING_BACKWARD = f"""\
ring, 3 ranks, backward: 9 tiles and 12 messages in 5 steps

        step 0   step 1   step 2       step 3
rank 0  Q0·K0    Q0·K2    Q0·K1        .
rank 1  Q1·K1    Q1·K0    Q1·K2        .
rank 2  Q2·K2    Q2·K1    Q2·K0        .
sends   0─KV0→1  1─KV0→2  1─KV_ACC0→2  2─KV_ACC0→0
        1─KV1→2  2─KV1→0  2─KV_ACC1→0  0─KV_ACC1→1
        2─KV2→0  0─KV2→1  0─KV_ACC2→1  1─KV_ACC2→2

{HOW}
"""

TOKEN_RING = f"""\
token_ring, 3 ranks, forward: 9 tiles and 12 messages in 5 steps

        step 0  step 1  step 2      step 3
rank 0  Q0·K0   Q2·K0   Q1·K0       .
rank 1  Q1·K1   Q0·K1   Q2·K1       .
rank 2  Q2·K2   Q1·K2   Q0·K2       .
sends   0─Q0→1  1─Q0→2  1─Q_ACC0→0  2─Q_ACC0→0
        1─Q1→2  2─Q1→0  2─Q_ACC1→1  0─Q_ACC1→1
        2─Q2→0  0─Q2→1  0─Q_ACC2→2  1─Q_ACC2→2

{HOW}
"""

TOKEN_RING_DIRECT = f"""\
token_ring_direct, 3 ranks, forward: 9 tiles and 12 messages in 5 steps

        step 0       step 1  step 2           step 3
rank 0  Q0·K0        Q2·K0   Q1·K0            .
rank 1  Q1·K1        Q0·K1   Q2·K1            .
rank 2  Q2·K2        Q1·K2   Q0·K2            .
sends   0─Q0→1               1─Q_ACC0→0 by 4  2─Q_ACC0→0
        1─Q1→2               2─Q_ACC1→1 by 4  0─Q_ACC1→1
        2─Q2→0               0─Q_ACC2→2 by 4  1─Q_ACC2→2
        0─Q0→2 by 2
        1─Q1→0 by 2
        2─Q2→1 by 2

{HOW}
"""

BIDIRECTIONAL = f"""\
ring | ring_reversed, 2 ranks, backward: 8 tiles and 4 messages in 4 steps

          step 0         step 1  step 2
rank 0 a  Q0·K0          Q0·K1   .
rank 0 b  Q0·K0          Q0·K1   .
rank 1 a  Q1·K1          Q1·K0   .
rank 1 b  Q1·K1          Q1·K0   .
sends     0─KV0a KV0b→1          1─KV_ACC0a KV_ACC0b→0
          1─KV1a KV1b→0          0─KV_ACC1a KV_ACC1b→1

{HOW}
"""


@pytest.mark.parametrize(
    ("schedules", "backward", "expected"),
    [
        ([ring(3)], False, RING),
        ([ring(3)], True, RING_BACKWARD),
        ([token_ring(3)], False, TOKEN_RING),
        ([token_ring(3, routing="direct")], False, TOKEN_RING_DIRECT),
        (bidirectional_ring(2), True, BIDIRECTIONAL),
        ([ring(1)], False, "ring, 1 rank, forward: 1 tile and 0 messages in 1 step\n\n        step 0\nrank 0  Q0·K0\n"),
    ],
)
def test_text(schedules: Sequence[Schedule], backward: bool, expected: str) -> None:
    assert draw_text(schedules, backward=backward) == expected


def test_text_shows_the_work_of_tiles_and_ranks() -> None:
    lower = prune(token_ring(2), {(0, 0), (1, 0), (1, 1)})
    text = draw_text([lower], areas=[{(0, 0): 10, (1, 1): 10, (1, 0): 20}])
    assert text.splitlines()[2:6] == [
        "        load  step 0     step 1      step 2",
        "rank 0  100%  Q0·K0 50%  Q1·K0 100%  .",
        "rank 1  33%   Q1·K1 50%  .           .",
        "sends         1─Q1→0                 0─Q_ACC1→1",
    ]


def test_text_of_many_ranks_folds_and_counts() -> None:
    lines = draw_text([token_ring(16, routing="direct")]).splitlines()
    assert max(map(len, lines)) <= TEXT_WIDTH
    assert [word for line in lines for word in line.split() if word.isdigit() and line.startswith(" " * 9 + "step")] == [
        str(step) for step in range(17)
    ]
    assert "sends    16 Q→+1       16 Q→+5 by 5  16 Q→+6 by 6      16 Q→+7 by 7      16 Q→+8 by 8" in lines
    assert sum(line.count("·K") for line in lines) == 256


CASES = {
    "ring": ([ring(4)], False),
    "ring backward": ([ring(4)], True),
    "token_ring": ([token_ring(4)], False),
    "token_ring direct": ([token_ring(4, routing="direct")], True),
    "two head groups": (bidirectional_ring(4), True),
    "head groups that share messages": ([token_ring(4), token_ring(4, direction=-1)], True),
    "several tiles a step": ([side_by_side(*bidirectional_ring(3))], True),
    "causal": ([prune(token_ring(6), {(i, j) for i in range(6) for j in range(i + 1)})], False),
    "world 1": ([token_ring(1)], True),
    "nothing to do": ([make("empty", 3, [], [], BufferLimits())], False),
    "no schedule": ([], False),
    "16 ranks": ([token_ring(16, routing="direct")], False),
}
cases = pytest.mark.parametrize(("schedules", "backward"), CASES.values(), ids=CASES.keys())


class Recorder:
    """A canvas that records its strokes."""

    def __init__(self) -> None:
        self.boxes: list[tuple[Point, Point, str, str]] = []
        self.arrows: list[tuple[Point, Point, tuple[str, ...], str]] = []
        self.texts: list[tuple[Point, str]] = []

    def box(self, corner: Point, size: Point, fill: str, title: str = "") -> None:
        self.boxes.append((corner, size, fill, title))

    def arrow(self, tail: Point, tip: Point, colours: Sequence[str], width: float, title: str = "") -> None:
        self.arrows.append((tail, tip, tuple(colours), title))

    def text(self, at: Point, text: str, size: float, colour: str = "", anchor: str = "") -> None:
        self.texts.append((at, text))


@cases
def test_every_tile_is_in_its_cell(schedules: Sequence[Schedule], backward: bool) -> None:
    time, canvas = timeline(schedules, backward=backward), Recorder()
    paint(time, canvas)
    grid = Grid(time)
    expected = Counter(
        (head_group, t.rank, t.step, f"Q{t.i}·K{t.j}", owner_colour(s.q_owner[t.i], s.world))
        for head_group, s in enumerate(schedules)
        for t in s.tiles
    )
    actual: Counter[tuple[int, int, int, str, str]] = Counter()
    for (x, y), (width, height), fill, title in (box for box in canvas.boxes if box[3]):
        rank = int((y - grid.top) // (grid.band + grid.gap))
        head_group, step = int((y - grid.y(rank)) // grid.tile), int((x - grid.left) // grid.column)
        assert x + width <= min(grid.x(step + 1), grid.right)
        assert y + height <= grid.y(rank) + (head_group + 1) * grid.tile
        actual[head_group, rank, step, title.rpartition(" ")[2], fill] += 1
    assert actual == expected
    corners = [corner for corner, _, _, title in canvas.boxes if title]
    assert len(set(corners)) == len(corners)


@cases
def test_every_message_goes_from_its_rank_and_step_to_its_rank_and_step(schedules: Sequence[Schedule], backward: bool) -> None:
    time, canvas = timeline(schedules, backward=backward), Recorder()
    paint(time, canvas)
    grid = Grid(time)
    expected = Counter(
        (m.src, m.dst, m.depart, m.arrival, frozenset(COLOURS[item.kind] for item in m.items))
        for m in messages(schedules, backward=backward)
    )
    actual: Counter[tuple[int, int, int, int, frozenset[str]]] = Counter()
    for tail, tip, colours, _ in (arrow for arrow in canvas.arrows if arrow[3]):
        ends = []
        for x, y in (tail, tip):
            ends += [
                [r for r in range(time.world) if grid.y(r) <= y <= grid.y(r) + grid.band],
                int((x - grid.left) // grid.column),
            ]
        (src,), depart, (dst,), arrival = ends
        actual[src, dst, depart, arrival, frozenset(colours)] += 1
        assert tip[0] < grid.right
        assert abs(tip[1] - tail[1]) == pytest.approx(
            abs(dst - src) * (grid.band + grid.gap) - grid.band
        )  # between facing edges
    assert actual == expected


@cases
def test_svg_is_xml_with_a_box_per_tile_and_an_arrow_per_message(schedules: Sequence[Schedule], backward: bool) -> None:
    svg = draw_svg(schedules, backward=backward)
    root = ElementTree.fromstring(svg)
    classes = Counter(element.get("class") for element in root.iter() if element.get("class"))
    assert classes["tile"] == sum(len(s.tiles) for s in schedules)
    assert classes["message"] == len(messages(schedules, backward=backward))
    assert "href" not in svg and "url(" not in svg


def test_svg_escapes_names() -> None:
    schedule = make('<&"', 1, [Tile(0, 0, 0, 0)], [], BufferLimits())
    root = ElementTree.fromstring(draw_svg([schedule]))
    assert root[0].text == '<&", 1 rank, forward'


@pytest.mark.parametrize("routing", ["hop", "direct"])
def test_names_of_arrows_stand_apart_and_between_rows(routing: str) -> None:
    time, canvas = timeline([token_ring(4, routing=routing)]), Recorder()
    paint(time, canvas)
    grid, labels = Grid(time), Counter(arrow.label for arrow in time.arrows)
    named = [(at, text) for at, text in canvas.texts if text in labels]
    assert Counter(text for _, text in named) == labels
    assert all(grid.clear(y - 4) for (_, y), _ in named)
    apart = [abs(a[0] - b[0]) > 12 or abs(a[1] - b[1]) > 11 for n, (a, _) in enumerate(named) for b, _ in named[:n]]
    assert all(apart)


@pytest.mark.parametrize("backward", [False, True])
def test_legend_names_what_travels_in_this_pass(backward: bool) -> None:
    canvas = Recorder()
    paint(timeline([ring(3)], backward=backward), canvas)
    legend = [text for _, text in canvas.texts if ": " in text]
    assert legend == ["KV: keys and values", *(["KV_ACC: dk, dv"] if backward else [])]


def test_a_step_without_tiles_or_departures_still_has_its_column() -> None:
    late = make(
        "late",
        2,
        [Tile(2, 1, 0, 1)],
        [Move(Kind.Q, 0, 0, 1, 0, 2), Move(Kind.Q_ACC, 0, 1, 0, 3, 4)],
        BufferLimits(q=1, q_acc=1),
    )
    assert draw_text([late]).splitlines()[2:5] == [
        "        step 0       step 1  step 2  step 3",
        "rank 0  .            .       .       .",
        "rank 1  .            .       Q0·K1   .",
    ]


def test_arrow_head_points_forward() -> None:
    tip, left, right = arrow_head((0, 0), (10, 0), size=5)
    assert tip == (10, 0) and left[0] == right[0] == 5 and left[1] == -right[1] != 0


@pytest.mark.slow
@cases
def test_png(schedules: Sequence[Schedule], backward: bool, tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    draw_png(schedules, tmp_path / "timeline.png", backward=backward)
    pixels = image.imread(tmp_path / "timeline.png")
    width, height = Grid(timeline(schedules, backward=backward)).size
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(width / height, rel=0.01)
    colours = {
        "#" + "".join(f"{round(255 * float(part)):02x}" for part in pixel[:3]) for row in pixels[::5] for pixel in row[::3]
    }
    assert {owner_colour(s.q_owner[t.i], s.world) for s in schedules for t in s.tiles} <= colours


def test_png_without_matplotlib_raises_with_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RingAttnError, match=r"pip install ringattn\[train\]"):
        draw_png([ring(2)], tmp_path / "timeline.png")
    assert not (tmp_path / "timeline.png").exists()


def test_drawing_needs_no_matplotlib_to_import() -> None:
    code = "import sys, ringattn.schedule.draw; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
