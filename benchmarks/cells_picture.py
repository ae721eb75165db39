"""Draws the time of ringattn beside the fastest other library in each cell of a folder, as one SVG.

    python benchmarks/cells_picture.py benchmarks/results/claimed docs/images/against_others.svg

Both passes where a cell has both, else forward alone. Every bar is a median in the folder's JSONs; nothing is measured here.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import tyro
from cells_report import PASSES, Outcome, outcomes

LINKS = {"mesh": "full mesh", "switch": "switch", "rails": "two nodes, uplink per host", "nodes": "two nodes, one uplink"}
OURS, OTHERS, INK, MUTED = "#0072b2", "#c3ccd5", "#1f2933", "#52606d"
WIDTH, LEFT, BAR, ROW, TOP = 920, 330, 15, 50, 74
FONT = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\""


def main(folder: tyro.conf.Positional[Path], picture: tyro.conf.Positional[Path]) -> None:
    picture.write_text(draw(folder))


def draw(folder: Path) -> str:
    """One pair of bars for each cell, the largest gain first."""
    cells = {outcome.cell: outcome for outcome in outcomes(folder)}  # of a cell with both passes, the later one: both
    ordered = sorted(cells.values(), key=lambda outcome: -outcome.against_peer)
    height = TOP + ROW * len(ordered) + 8
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" {FONT}>'
    title = "Time of one attention call: ringattn, schedule chosen by itself, and the fastest other library"
    legend = "bf16, head_dim 64, links of 50 Mbit/s (nodes: 25); real gloo ranks, CPU. Shorter is better."
    parts = [_text(16, 26, title, 16), _text(16, 48, legend, 12, MUTED)]
    longest = max(outcome.peer[1] for outcome in ordered)
    for n, outcome in enumerate(ordered):
        parts += _row(TOP + n * ROW, outcome, _described(folder, outcome), (WIDTH - LEFT - 290) / longest)
    return "\n".join([head, f"<title>{title}</title>", paper, *parts, "</svg>", ""])


def _row(y: float, outcome: Outcome, names: tuple[str, str], scale: float) -> list[str]:
    name, peer = outcome.peer
    lines = [_text(LEFT - 10, y + 12, names[0], 12, anchor="end"), _text(LEFT - 10, y + 28, names[1], 11, MUTED, "end")]
    ours = f"{outcome.auto * 1e3:,.0f} ms, {outcome.against_peer:.2f} times as fast"
    for at, seconds, colour, label in (
        (y, outcome.auto, OURS, ours),
        (y + BAR + 2, peer, OTHERS, f"{peer * 1e3:,.0f} ms, {name}"),
    ):
        lines.append(f'<rect x="{LEFT}" y="{at}" width="{seconds * scale:.1f}" height="{BAR}" rx="3" fill="{colour}"/>')
        lines.append(_text(LEFT + seconds * scale + 8, at + 12, label, 11))
    return lines


def _described(folder: Path, outcome: Outcome) -> tuple[str, str]:
    """Links and ranks; what was computed."""
    data = json.loads((folder / f"{outcome.cell}.json").read_text())
    config = data["config"]
    heads = f"{config['heads']} heads" + (f" over {config['kv_heads']}" if config["kv_heads"] != config["heads"] else "")
    emulated = ", kernel emulated" if data["emulated"] else ""
    return (
        f"{LINKS[outcome.cell.split('-')[0]]}, {data['world']} ranks{emulated}",
        f"{config['mask']} mask, {heads}, {PASSES[outcome.passed]}",
    )


def _text(x: float, y: float, text: str, size: int, colour: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
