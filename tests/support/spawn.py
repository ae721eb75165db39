"""Real ranks for tests: processes with a gloo group, whose failures are told in full and who never hang a build.

A fork server imports torch and transformers once, so that starting eight ranks costs about as much as starting one. When time
is up every rank prints the stacks of all its threads and is killed; the test fails with all of them in its message.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.support.preload"]
)  # found where pytest runs at the root; else ranks import for themselves


class RankFailure(AssertionError):
    """Some rank raised, died or hung; the message holds what each of them said."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 50) -> list[Any]:
    """`[function(rank, *args) for rank in range(world)]`, each in its own process of one gloo group.

    Return numbers, text or numpy arrays: a tensor is sent as shared memory, which ends with the rank that made it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_main, args=(rank, world, scratch, theirs, function, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout, Path(scratch))
        finally:
            for process in processes:
                process.kill()
                process.join()


def finish(process: "subprocess.Popen[str]", timeout: float) -> tuple[int, str, str]:
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


def start(command: list[str], **more: str) -> "subprocess.Popen[str]":
    """A Python command in a clean environment, without what a surrounding job may have set."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC"))
    }
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | more
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(*command: str, ranks: int, timeout: float = 50, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return finish(start([*launch, *command], **more), timeout)


JITS = 300  # seconds: the first use of DeepSpeed in a run compiles its CPU collectives


def torch_extensions(tmp_path: Path) -> str:
    """Where C++ is compiled: a folder of this run, which its workers share. In that of the user a process that was killed while
    it compiled leaves a lock, for which every later one would wait without end."""
    return str(tmp_path.parents[1 if "PYTEST_XDIST_WORKER" in os.environ else 0] / "torch_extensions")


def _main(rank: int, world: int, scratch: str, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with open(f"{scratch}/stacks{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(1)
        try:
            store = dist.FileStore(f"{scratch}/store", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=45))
            pipe.send((True, function(rank, *args)))
            dist.destroy_process_group()
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _collect(pipes: list[Connection], processes: list[Any], deadline: float, scratch: Path) -> list[Any]:
    answers: dict[int, tuple[bool, Any]] = {}
    failed = False
    while len(answers) < len(pipes) and time.monotonic() < deadline:
        for rank, pipe in enumerate(pipes):
            if rank not in answers and pipe.poll(0.005):
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    processes[rank].join(2)
                    answers[rank] = (False, f"died without a word, exit code {processes[rank].exitcode}")
                if not answers[rank][0] and not failed:
                    failed, deadline = (
                        True,
                        min(deadline, time.monotonic() + 5),
                    )  # the others may fail of it; give them a moment
    hung = [rank for rank in range(len(pipes)) if rank not in answers]
    for rank in hung:
        answers[rank] = (False, "did not return. Its stacks:\n" + _stacks(processes[rank], scratch / f"stacks{rank}"))
    if any(not good for good, _ in answers.values()):
        told = [f"--- rank {rank}: {what}" for rank, (good, what) in sorted(answers.items()) if not good]
        raise RankFailure("\n".join(told))
    return [answers[rank][1] for rank in range(len(pipes))]


def _stacks(process: Any, path: Path) -> str:
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
    return path.read_text()
