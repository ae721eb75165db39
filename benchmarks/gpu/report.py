"""Turns the JSONs of a run into tables and pictures: DIR/report.md, and on request the tables of docs/gpu.md.

    python benchmarks/gpu/report.py benchmarks/results/gpu/DATE-CARD [--into docs/gpu.md]

A page has `<!-- gpu:NAME -->` and `<!-- gpu:end -->` around each table, and what is between them is replaced. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from charts import line_chart
from stages import SHARES

Json = dict[str, Any]
MARKED = re.compile(r"(<!-- gpu:(?!end)(\w+) -->\n).*?(<!-- gpu:end -->)", re.DOTALL)


def write(folder: Path, page: Path | None = None) -> Path:
    """Make DIR/report.md and the pictures from the JSONs in `folder`; and the tables of `page`. Returns the report's path."""
    results = load(folder)
    pictures = draw(folder, results)
    sections = {name: section(name, results) for name in SECTIONS}
    title = f"# {results.get('run', {}).get('date', 'Undated')}, {card(results)}\n"
    parts = [title, *(f"## {SECTIONS[name][0]}\n\n{body}\n" for name, body in sections.items() if body)]
    parts += [f"![{name}]({name})\n" for name in pictures]
    (folder / "report.md").write_text("\n".join(parts))
    if page is not None:
        fill(page, sections | {"pictures": linked(folder, page, pictures)})
    return folder / "report.md"


def load(folder: Path) -> dict[str, Json]:
    """By stage, in the order of `SHARES`; and "run"."""
    paths = {name: folder / f"{name}.json" for name in ("run", *SHARES)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def fill(page: Path, sections: Mapping[str, str]) -> None:
    """Replace what stands between the markers of `page`; a marker that names no section is an error."""

    def replaced(match: re.Match[str]) -> str:
        if match[2] not in sections:
            raise SystemExit(f"{page} has a marker for {match[2]!r}; there are {', '.join(sections)}")
        return f"{match[1]}{sections[match[2]] or 'Not run.'}\n{match[3]}"

    page.write_text(MARKED.sub(replaced, page.read_text()))


def linked(folder: Path, page: Path, pictures: Iterable[str]) -> str:
    where = Path(os.path.relpath(folder, page.parent))
    return "\n\n".join(f"![{name}]({(where / name).as_posix()})" for name in pictures)


def card(results: Mapping[str, Json]) -> str:
    """The device and the versions in a line."""
    figures = results.get("environment", {}).get("figures", {})
    named = {"torch": "torch", "cuda": "CUDA", "cudnn": "cuDNN", "nccl": "NCCL"}
    versions = [f"{word} {figures[key]}" for key, word in named.items() if figures.get(key)]
    return ", ".join([figures.get("gpu") or results.get("run", {}).get("card", "unknown device"), *versions])


def table(rows: list[Json], columns: Iterable[str] | None = None) -> str:
    """Markdown, with the columns of the first row unless they are given; empty where there are no rows."""
    if not rows:
        return ""
    names = list(columns or rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows])


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float) and value and abs(value) < 0.01:
        return f"{value:.1e}"
    return "" if value is None else str(value).replace("|", "/")


def section(name: str, results: Mapping[str, Json]) -> str:
    return SECTIONS[name][1](results).strip()


def rows_of(results: Mapping[str, Json], stage: str, name: str) -> list[Json]:
    rows: list[Json] = results.get(stage, {}).get("figures", {}).get(name, [])
    return rows


def summary(results: Mapping[str, Json]) -> str:
    """One row for each stage, what failed in words, and the goals."""
    stages = [result for name, result in results.items() if name != "run"]
    counts = [
        {"stage": r["stage"], "status": r["status"], "seconds": r["seconds"], "failures": len(r["failures"])} for r in stages
    ]
    goals = [goal | {"stage": r["stage"]} for r in stages for goal in r["goals"]]
    failures = [f"- {r['stage']}: {words}" for r in stages for words in r["failures"]]
    parts = [card(results) + f", {results.get('run', {}).get('date', 'undated')}.", table(counts)]
    parts += ["What failed:\n\n" + "\n".join(failures)] if failures else []
    return "\n\n".join([*parts, table(goals, ("stage", "goal", "least", "most", "found", "met"))])


def simple(stage: str, *names: str) -> Callable[[Mapping[str, Json]], str]:
    """The tables of one stage, with its single figures in a line before them."""

    def make(results: Mapping[str, Json]) -> str:
        figures = results.get(stage, {}).get("figures", {})
        single = [f"{key.replace('_', ' ')} {value}" for key, value in figures.items() if not isinstance(value, (list, dict))]
        parts = ["; ".join(single) + "." if single else "", *(table(rows_of(results, stage, name)) for name in names)]
        return "\n\n".join(filter(None, parts))

    return make


def launches(results: Mapping[str, Json]) -> str:
    columns = ("kernel", "schedule", "mask", "forward", "backward")
    host = rows_of(results, "launches", "host_us_per_tile")
    parts = [table(rows_of(results, "launches", "launches"), columns)]
    parts += ["Host, us per tile:\n\n" + table(host)] if host else []
    return "\n\n".join(filter(None, parts))


def processes(results: Mapping[str, Json]) -> str:
    """Graphs, the compiler, and real processes."""
    parts = []
    for stage, name in (("graphs", "graphs"), ("compiled", "compiled"), ("symmetric", "processes"), ("nccl", "ranks")):
        body = table(rows_of(results, stage, name))
        result = results.get(stage, {})
        left_out = "; ".join(result.get("left_out", []))
        parts.append(f"{stage} ({result.get('status', 'not run')}{', ' if left_out else ''}{left_out})\n\n{body}".strip())
    killed = results.get("nccl", {}).get("figures", {}).get("killed_peer")
    parts += [f"A killed peer, after {killed['seconds']} s: {killed['said']}"] if killed else []
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Json]], str]]] = {
    "summary": ("Stages", summary),
    "correctness": ("Errors against fp64", simple("correctness", "errors")),
    "traps": ("Traps", simple("traps", "traps")),
    "baselines": ("Dense attention by torch, TFLOP/s", simple("baselines", "products", "dense")),
    "efficiency": ("Efficiency of simulated ranks", simple("efficiency", "efficiency")),
    "launches": ("Launches per tile that are not attention", launches),
    "merge": ("Merging", simple("merge", "merge")),
    "memory": ("Memory of one rank", simple("memory", "memory")),
    "processes": ("Graphs, compiler, processes", processes),
}


def draw(folder: Path, results: Mapping[str, Json]) -> list[str]:
    """SVG files for what there are figures of; their names."""
    built: dict[str, tuple[str, dict[str, list[tuple[float, float]]], str, dict[str, float] | None]] = {}
    for mask in ("full", "causal"):
        speeds: dict[str, list[tuple[float, float]]] = {}
        for row in rows_of(results, "baselines", "dense"):
            if row["mask"] == mask:
                speeds.setdefault(row["kernel"], []).append((row["rows"], row["both"]))
        built[f"baselines-{mask}.svg"] = (f"Dense attention, {mask}", speeds, "TFLOP/s, forward + backward", None)
        fractions: dict[str, list[tuple[float, float]]] = {}
        for row in rows_of(results, "efficiency", "efficiency"):
            if row["mask"] == mask and row["schedule"] == "token_ring" and row["kernel"] == "sdpa":
                fractions.setdefault(f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}", []).append((row["rows"], row["of_best"]))
        words = "fraction of the best dense attention"
        built[f"efficiency-{mask}.svg"] = (f"token_ring, sdpa, {mask}", fractions, words, {"dense": 1.0})
    built = {name: what for name, what in built.items() if what[1]}
    for name, (title, lines, up, marks) in built.items():
        chart = line_chart(title, lines, across="rows of the whole sequence", up=up, marks=marks)
        (folder / name).write_text(chart)
    return list(built)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, help="a page whose tables are replaced, docs/gpu.md say")
    asked = parser.parse_args()
    print(write(asked.folder, asked.into))
    return 0


if __name__ == "__main__":
    sys.exit(main())
