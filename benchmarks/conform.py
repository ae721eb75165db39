"""Sweeps the model types of transformers over 1, 2 and 3 ranks: exact, refused with a reason, or a fault.

    OMP_NUM_THREADS=1 python benchmarks/conform.py --page docs/conformance.md
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from conformance.models import TASKS, all_models
from conformance.ranks import Job
from conformance.report import lines, write

SILENCE = 150  # seconds without a result after which a job is ended, and started again behind the case it was at


@dataclass
class Args:
    """worlds: numbers of ranks; types, cases: all by default; out: the folder of results; page: a file for the tables."""

    out: Path = Path("benchmarks/results/conformance")
    worlds: tuple[int, ...] = (1, 2, 3)
    types: tuple[str, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    cases: tuple[str, ...] = ()
    page: Path | None = None
    again: tuple[str, ...] = field(default=())  # outcomes to run again, e.g. third


def main(args: Args) -> int:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["conformance.ranks"])
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "results.jsonl"
    models = [(task, name) for task, name in all_models() if task in args.tasks and (not args.types or name in args.types)]
    sweep(out, models, Job(args.worlds, cases=args.cases or None), args.again)
    write(args.out, args.page)
    wanted = set(models)
    return int(any(line["kind"] == "third" for line in lines(out) if (line["task"], line["type"]) in wanted))


def sweep(out: Path, models: list[tuple[str, str]], job: Job, again: tuple[str, ...] = ()) -> None:
    """All cases that have no result in the file `out` yet, in as many jobs as it takes."""
    keep = [line for line in lines(out) if line["kind"] not in again]
    out.write_text("".join(json.dumps(line) + "\n" for line in keep))
    while models:
        done = frozenset((line["task"], line["type"], line["case"], line["world"]) for line in lines(out))
        with tempfile.TemporaryDirectory() as folder:
            reached = ended_at(replace(job, folder=folder, out=str(out), done=done), models)
        if reached is None:
            return
        task, name = models[reached]
        print(f"the job ended at {name} ({task})", file=sys.stderr)
        stuck = {"world": 0, "task": task, "type": name, "case": "rest", "kind": "third", "text": "the ranks hung or died"}
        with out.open("a") as file:
            file.write(json.dumps(stuck) + "\n")
        models = models[reached + 1 :]


def ended_at(job: Job, models: list[tuple[str, str]]) -> int | None:
    """None when all ranks of a job came to the end, or the index of the model at which they did not."""
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=job.run, args=(rank, job, models), daemon=True) for rank in range(max(job.worlds))]
    for process in ranks:
        process.start()
    size, since = -1, time.monotonic()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        time.sleep(0.1)
        now = Path(job.out).stat().st_size
        size, since = (now, time.monotonic()) if now != size else (size, since)
        if time.monotonic() - since > SILENCE:
            break
    good = all(process.exitcode == 0 for process in ranks)
    for process in ranks:
        process.kill()
        process.join()
    return None if good else int(Path(job.folder, "reached").read_text() or 0)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
