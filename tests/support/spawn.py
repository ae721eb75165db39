"""Real ranks for tests: processes with a gloo group, whose failures are told in full and who never hang a build.

A fork server imports torch and transformers once, so that starting eight ranks costs about as much as starting one; ranks live
on for later tests that want as many (tests/rank_pool.py). When time is up every rank prints the stacks of all its threads and
is killed; the test fails with all of them in its message. Scripts are started here as well, with torchrun or without.
"""

import atexit
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forked import Command
from rank_pool import Pool, RankFailure

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.support.preload"]
)  # found where pytest runs at the root; else ranks import for themselves


_pool = Pool(_context)
atexit.register(_pool.end)


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 100, isolated: bool = False) -> list[Any]:
    """`[function(rank, *args) for rank in range(world)]`, each in its own process of one gloo group, made for this call.

    Return numbers, text or numpy arrays: a tensor is sent as shared memory, which ends with the rank that made it. isolated: in
    processes that nothing ran in before and nothing will after; those that kill or stop ranks, or whose first use of something
    is what is tested, ask for it.
    """
    return _pool.run(world, function, args, timeout, isolated)


Process = subprocess.Popen[str] | Command


def finish(process: Process, timeout: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a started job. One that hangs shows the stacks of all its processes; nothing survives."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started = [*descendants(process.pid), process.pid]
        for number in (signal.SIGABRT, signal.SIGKILL):  # with PYTHONFAULTHANDLER set, the first prints stacks
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.5)
        out, err = process.communicate()
        raise RankFailure(f"no end within {timeout} s\n{out}\n{err}") from None
    return process.returncode, out, err


def descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return children + [d for child in children for d in descendants(child)]


def start(command: list[str], *, fresh: bool = False, ranks: int | None = None, **more: str) -> Process:
    """A Python command in a clean environment, without what a surrounding job may have set.

    It runs in a forked process that has torch already, `ranks` of them as one job; a `fresh` one starts a new interpreter.
    """
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC"))
    }
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | more
    if not fresh:
        return Command(_context, command, environment, ranks)
    if ranks:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*command: str, ranks: int, timeout: float = 100, fresh: bool = False, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script under what torchrun sets up; `fresh`: under torchrun itself."""
    return finish(start(list(command), fresh=fresh, ranks=ranks, **more), timeout)


JITS = 300  # seconds: the first use of DeepSpeed in a run compiles its CPU collectives
KEPT = Path(__file__).parents[2] / ".pytest_cache" / "torch_extensions"


def torch_extensions(tmp_path: Path) -> str:
    """Where C++ is compiled: a folder of this run, which its workers share. In that of the user a process that was killed while
    it compiled leaves a lock, for which every later one would wait without end.

    What was compiled to the end is kept for later runs with the same versions, which begin with a copy of it.
    """
    folder = tmp_path.parents[1 if "PYTEST_XDIST_WORKER" in os.environ else 0] / "torch_extensions"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "ninja"))
    kept = KEPT / hashlib.sha256(f"{sys.prefix} {sys.version} {versions}".encode()).hexdigest()[:16]
    if kept.exists() and not folder.exists():
        _copied(kept, folder)
    elif not kept.exists() and list(folder.glob("*/*.so")) and not list(folder.glob("*/lock")):
        _copied(folder, kept)
    return str(folder)


def _copied(source: Path, target: Path) -> None:
    """All or nothing, whoever else does the same at the same time. Times of change go along, or all would be compiled again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside, contextlib.suppress(OSError):
        shutil.copytree(source, Path(beside) / "copy")
        (Path(beside) / "copy").rename(target)
