"""A long run of the main job that is disturbed, against the same run that is not: every step once, every loss bit for bit.

    python benchmarks/soak.py --kills 50
    python benchmarks/soak.py --delays --steps 2000

With kills, a random rank is killed at random moments and torchrun starts all anew from the last checkpoint. With delays, ranks
sleep at random before they wait for a message. Prints one line, also to --json; exit status 1 if a bit or a step is lost.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

TRAIN = Path(__file__).parent.parent / "launch" / "train.py"
SMALL = "--seq-len 256 --dim 24 --layers 1 --heads 3 --kv-heads 3 --head-dim 8 --hidden-dim 32 --no-plots --auto-resume"
LEARNED = ("step", "loss", "gradient_norm", "lr")
DELAYED = "soak-delayed"  # how a rank of this script knows that it is to be slow


@dataclass(frozen=True)
class Config:
    """What to disturb the run with."""

    steps: int = 3000
    ranks: int = 4
    kills: int = 0
    delays: bool = False
    save_every: int = 10
    seed: int = 0
    json: Path | None = None
    """Where to write what was seen."""


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder, "calm"), Path(folder, "disturbed")
        begin = time.monotonic()
        _wait(_start(config, calm, str(TRAIN)))
        between = time.monotonic()
        script = [str(Path(__file__)), DELAYED] if config.delays else [str(TRAIN)]
        job = _start(config, disturbed, *script)
        killed = _kill(job, config, disturbed / "metrics.jsonl")
        _wait(job)
        end = time.monotonic()
        same, steps = _learned(calm) == _learned(disturbed), len(_learned(disturbed))
        results = dict(steps_logged=steps, killed=killed, bit_identical=same, calm_s=between - begin, disturbed_s=end - between)
        print(json.dumps(results))
        if config.json:
            config.json.write_text(json.dumps(asdict(config) | results, indent=1, default=str) + "\n")
        sys.exit(0 if same and steps == config.steps and killed == config.kills else 1)


def _start(config: Config, out: Path, *script: str) -> subprocess.Popen[bytes]:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {config.ranks} --max-restarts {config.kills + 1}"
    flags = f"{SMALL} --steps {config.steps} --save-every {config.save_every} --out {out}"
    command = [sys.executable, *shlex.split(launch), *script, *shlex.split(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill(job: subprocess.Popen[bytes], config: Config, metrics: Path) -> int:
    """Kill a random rank whenever so many more lines have been written; returns how often."""
    draw, done = random.Random(config.seed), 0
    while done < config.kills and job.poll() is None:
        before, more = _size(metrics), draw.randint(1, 60) * 150  # bytes, about a line each
        while job.poll() is None and abs(_size(metrics) - before) < more:  # a restart makes the file shorter first
            time.sleep(0.01)
        workers = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        if workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
            done += 1
            time.sleep(2)  # for the agent to notice
    return done


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _wait(job: subprocess.Popen[bytes]) -> None:
    if job.wait():
        sys.exit(f"the job ended with status {job.returncode}")


def _learned(out: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in LEARNED) for line in lines]


def delayed() -> None:
    """The main job on a rank that sleeps at random before it waits."""
    from ringattn.comm import SharedMemoryPort  # what `init` takes on one host

    sleep, wait = random.Random(os.environ["RANK"]), SharedMemoryPort.wait

    def late(port: SharedMemoryPort, message: Any) -> Any:
        time.sleep(sleep.choice((0, 0, 0, 0, 0.001, 0.003)))
        return wait(port, message)

    mock.patch.object(SharedMemoryPort, "wait", late).start()
    sys.argv = [str(TRAIN), *sys.argv[2:]]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    delayed() if sys.argv[1:2] == [DELAYED] else main(tyro.cli(Config, description=__doc__))
