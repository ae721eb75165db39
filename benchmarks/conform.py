"""Sweeps the model types of transformers over 1, 2 and 3 ranks: exact, refused with a reason, or a fault.

    OMP_NUM_THREADS=1 python benchmarks/conform.py --worlds 1 2 3 --out benchmarks/results/conformance
    python benchmarks/conform.py --types llama bloom t5 --worlds 2 --out /tmp/conformance

Results are written as they come, one line of JSON per case; what is there already is not run again, so that an interrupted
sweep goes on. The exit code is 1 if any case has a third outcome. See `conformance` for how it is done.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from conformance.models import TASKS
from conformance.ranks import Job, run
from conformance.report import lines, write

SILENCE = 150  # seconds without a result after which a job is ended, and started again behind the case it was at


@dataclass
class Args:
    """worlds: numbers of ranks; types: all by default; out: the folder of results."""

    out: Path
    worlds: tuple[int, ...] = (1, 2, 3)
    types: tuple[str, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    again: tuple[str, ...] = field(default=())  # outcomes to run again, e.g. third


def main(args: Args) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "results.jsonl"
    models = [(task, name) for task in args.tasks for name in TASKS[task] if not args.types or name in args.types]
    sweep(args.worlds, out, models, args.again)
    write(args.out)
    wanted = set(models)
    return int(any(line["kind"] == "third" for line in lines(out) if (line["task"], line["type"]) in wanted))


def sweep(worlds: tuple[int, ...], out: Path, models: list[tuple[str, str]], again: tuple[str, ...] = ()) -> None:
    """All cases that have no result yet, in as many jobs as it takes."""
    keep = [line for line in lines(out) if line["kind"] not in again]
    out.write_text("".join(json.dumps(line) + "\n" for line in keep))
    while models:
        done = frozenset((line["task"], line["type"], line["case"], line["world"]) for line in lines(out))
        with tempfile.TemporaryDirectory() as folder:
            reached = job(Job(worlds, folder, str(out), done), models)
        if reached is None:
            return
        print(f"the job ended at {' '.join(models[reached])}", file=sys.stderr)
        task, name = models[reached]
        stuck = {"world": 0, "task": task, "type": name, "case": "rest", "kind": "third", "text": "the ranks hung or died"}
        with out.open("a") as file:
            file.write(json.dumps(stuck) + "\n")
        models = models[reached + 1 :]


def job(what: Job, models: list[tuple[str, str]]) -> int | None:
    """None when all ranks came to the end, or the index of the model at which they did not."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, what, models), daemon=True) for rank in range(max(what.worlds))]
    for process in ranks:
        process.start()
    size, since = -1, time.monotonic()
    while any(process.is_alive() for process in ranks):
        time.sleep(0.2)
        now = Path(what.out).stat().st_size if Path(what.out).exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > SILENCE or any(process.exitcode for process in ranks):
            break
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    if all(process.exitcode == 0 for process in ranks):
        return None
    counter = Path(what.folder) / "reached"
    return int(counter.read_text()) if counter.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
