"""What the cells of `cells.py` came to: a table, how good the predictions were, and a picture.

    python benchmarks/cells_report.py benchmarks/results/matrix

Reads every JSON in a folder and writes `report.md` and `report.png` beside them. "auto" is the plan for training; in the lines
of forward alone, where backward was run too, it is the plan for inference. A ratio above 1 means that auto was faster. A
prediction counts as a miss when it is more than 15 % off what was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

MISS = 0.15
PASSES = {"forward": "forward", "both": "forward + backward"}


@dataclass(frozen=True)
class Outcome:
    """One pass of one cell. Seconds are medians of the slowest rank."""

    cell: str
    passed: str
    auto: float
    predicted: float
    bound: float
    peer: tuple[str, float]
    own: tuple[str, float]

    @property
    def against_peer(self) -> float:
        return self.peer[1] / self.auto

    @property
    def against_own(self) -> float:
        return self.own[1] / self.auto

    @property
    def off(self) -> float:
        """How far the prediction is from the measurement, relative to the measurement."""
        return self.predicted / self.auto - 1


def outcomes(folder: Path) -> list[Outcome]:
    results = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        names = [row["name"] for row in facts["contenders"]]
        if "ringattn auto" not in names or all(name.startswith("ringattn") for name in names):
            print(f"{path.name}: left out, auto or every peer could not run")
            continue
        for passed in ["forward"] if facts["config"]["forward_only"] else list(PASSES):
            results.append(_outcome(path.stem, passed, facts["contenders"]))
    return results


def _outcome(cell: str, passed: str, rows: list[dict[str, Any]]) -> Outcome:
    """Of forward alone where both passes were run: the plan for inference."""
    rows = [row for row in rows if passed in row]
    autos = {row["name"]: row for row in rows if row["name"].startswith("ringattn auto")}
    auto = autos["ringattn auto, inference" if passed == "forward" and len(autos) > 1 else "ringattn auto"]
    fastest = {
        ours: min(
            ((row["name"], row[passed]) for row in rows if row["ours"] is ours and row["name"] not in autos), key=lambda r: r[1]
        )
        for ours in (True, False)
    }
    return Outcome(
        cell, passed, auto[passed], auto[f"predicted_{passed}"], auto[f"bound_{passed}"], fastest[False], fastest[True]
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    results = outcomes(folder)
    if not results:
        raise SystemExit(f"{folder}: no cells there; run benchmarks/cells.py --out {folder} first")
    (folder / "report.md").write_text("\n".join(_lines(results, folder)) + "\n")
    _draw(results, folder / "report.png")
    print("\n".join(_lines(results, folder)))


def _lines(results: list[Outcome], folder: Path) -> list[str]:
    first = json.loads(next(iter(sorted(folder.glob("*.json")))).read_text())
    good = sum(abs(o.off) <= MISS for o in results)
    cells = len({outcome.cell for outcome in results})
    head = [
        f"{len(results)} figures of {cells} cells, {first['date'][:10]}, torch {first['versions']['torch']}.",
        f"Predictions within {MISS:.0%}: {good} of {len(results)}. auto at least 0.95 x the fastest peer: "
        f"{sum(o.against_peer >= 0.95 for o in results)} of {len(results)}; at least 0.95 x our fastest fixed schedule: "
        f"{sum(o.against_own >= 0.95 for o in results)} of {len(results)}.",
        "",
        "| cell | pass | auto | predicted | time / bound | fastest peer / auto | fastest fixed schedule / auto |",
        "|---|---|---|---|---|---|---|",
    ]
    return head + [
        f"| {o.cell} | {PASSES[o.passed]} | {o.auto * 1e3:.0f} ms | {o.off:+.0%} | {o.auto / o.bound:.2f} "
        f"| {o.against_peer:.2f} x ({o.peer[0]}) | {o.against_own:.2f} x ({o.own[0].removeprefix('ringattn ')}) |"
        for o in results
    ]


def _draw(results: list[Outcome], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (ratios, model) = plt.subplots(1, 2, figsize=(13, max(4.0, 0.16 * len(results))), layout="constrained")
    ordered = sorted(results, key=lambda o: o.against_peer)
    ratios.barh(range(len(ordered)), [o.against_peer for o in ordered], color="#3b6ea5")
    ratios.set_yticks(range(len(ordered)), [f"{o.cell} {o.passed}" for o in ordered], fontsize=5)
    ratios.axvline(1, color="black", linewidth=0.8)
    ratios.set(xlabel="time of the fastest peer / time of auto", xscale="log")
    low, high = 0.8 * min(o.auto for o in results), 1.25 * max(o.auto for o in results)
    model.plot([low, high], [low, high], color="black", linewidth=0.8)
    model.fill_between([low, high], [low / (1 + MISS), high / (1 + MISS)], [low / (1 - MISS), high / (1 - MISS)], alpha=0.15)
    for passed, marker in (("forward", "o"), ("both", "^")):
        subset = [o for o in results if o.passed == passed]
        model.scatter([o.predicted for o in subset], [o.auto for o in subset], s=14, marker=marker, label=PASSES[passed])
    model.set(xscale="log", yscale="log", xlabel="predicted, s", ylabel="measured, s", title="the band is 15 % either way")
    model.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
