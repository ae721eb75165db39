"""Runs one stage in this process and writes its JSON, again after every figure, so that a killed stage keeps what it found.

    PYTHONPATH=. python benchmarks/gpu/stage.py NAME --device cuda --seconds 30 --out NAME.json

`run.py` starts it. The JSON has: stage, status, seconds, device, figures, failures, goals, left_out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


class NotApplicable(Exception):
    """The stage has nothing to do on this device; its text says why."""


class Stage:
    """What one stage found. `seconds` is how long it should take: it is the stage's own business to stop in time."""

    def __init__(self, name: str, device: str, seconds: float, out: Path) -> None:
        import torch

        self.name, self.seconds, self.out = name, seconds, out
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.small = device == "cpu"  # the same code on sizes that a CPU can do
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []
        self.goals: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.write("running")

    def left(self) -> float:
        """Seconds left of what this stage should take, counted from the start of the process."""
        return self.seconds - (time.perf_counter() - STARTED)

    def note(self, **figures: Any) -> None:
        """Single figures by name."""
        self.figures |= figures
        self.write("running")

    def row(self, table: str, **cells: Any) -> None:
        """One more row of a table of figures."""
        self.figures.setdefault(table, []).append(cells)
        self.write("running")

    def check(self, right: bool, words: str) -> None:
        """A statement that must hold; `words` say what is wrong where it does not."""
        if not right:
            self.failures.append(words)
            self.write("running")

    @contextlib.contextmanager
    def guard(self, words: str) -> Iterator[None]:
        """An exception inside is a failure of this stage, in words, and the next case goes on."""
        try:
            yield
        except NotApplicable:
            raise
        except Exception as error:
            self.check(False, f"{words}: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc()

    def goal(self, words: str, results: float, *, least: float | None = None, most: float | None = None) -> None:
        """A speed or size that is wished for. A missed one is reported and is no failure: nothing is wrong."""
        met = (least is None or results >= least) and (most is None or results <= most)
        self.goals.append({"goal": words, "least": least, "most": most, "found": results, "met": met})
        self.write("running")

    def omit(self, words: str) -> None:
        """Something that was not tried, and why."""
        self.left_out.append(words)
        self.write("running")

    def write(self, status: str) -> None:
        results = {"stage": self.name, "status": status, "seconds": round(time.perf_counter() - STARTED, 3)}
        results |= {"device": str(self.device), "figures": self.figures, "failures": self.failures}
        write_json(self.out, results | {"goals": self.goals, "left_out": self.left_out})


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["without a text"])[0][:500]


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=str) + "\n")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the stage should take")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--break", dest="broken", choices=("raise", "hang", "die"), help="see run.py")
    asked = parser.parse_args()
    import torch

    if asked.device == "cpu":
        torch.set_num_threads(1)
    stage = Stage(asked.name, asked.device, asked.seconds, asked.out)
    status = "passed"
    try:
        if asked.broken:
            break_on_purpose(asked.broken)
        importlib.import_module(f"stages.{asked.name}").run(stage)
    except NotApplicable as why:
        status = "not applicable"
        stage.left_out.append(str(why))
    except BaseException as error:
        status = "broken"
        stage.failures.append(f"{type(error).__name__}: {first_line(error)}")
        traceback.print_exc()
    if status == "passed" and stage.failures:
        status = "failed"
    stage.write(status)
    return int(status in ("failed", "broken"))


def break_on_purpose(how: str) -> None:
    """What `run.py --break` asks for: an error, a hang with a child process that hangs too, or death without a word."""
    if how == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        print(f"hangs on purpose, with process {child.pid}", flush=True)
        child.wait()
    if how == "die":
        os.kill(os.getpid(), 9)
    raise RuntimeError("broken on purpose")


if __name__ == "__main__":
    sys.modules["stage"] = sys.modules["__main__"]  # the stages import this module by name and must get this one
    sys.exit(main())
