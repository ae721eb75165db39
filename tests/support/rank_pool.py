"""Living rank processes, one set for each number of ranks, that run one function after another.

Each run has a gloo group of its own, made for it and destroyed after it, so that what ringattn keeps for a group ends with it.
Ranks whose run failed, hung or left something behind (see rank_state) are ended, and the next run starts new ones.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_state import Start, State

MOST = 3  # sets that are kept alive: memory is what they cost
CLEANS_UP = 10.0  # seconds that ranks get for it after their answers; else they are replaced


class RankFailure(AssertionError):
    """Some rank raised, died or hung; the message holds what each of them said."""


class Ranks:
    """The processes of one group of `world` ranks."""

    def __init__(self, context: Any, world: int) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        self.runs = 0
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self._scratch.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        self.runs += 1
        deadline = time.monotonic() + timeout
        what = bytes(reduction.ForkingPickler.dumps((function, args)))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # it has died; what it says or does not say is collected below
                pipe.send((self.runs, os.getcwd(), list(sys.path), what))
        return self._collect(deadline)

    def ready(self) -> bool:
        """Whether every rank has cleaned up after its run and found itself as it was before."""
        until = time.monotonic() + CLEANS_UP
        for pipe in self._pipes:
            try:
                if not pipe.poll(max(0, until - time.monotonic())) or pipe.recv():
                    return False
            except (EOFError, OSError):
                return False
        return True

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._scratch.cleanup()

    def _collect(self, deadline: float) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        failed = False
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(2)
                    answers[rank] = (False, f"died without a word, exit code {self._processes[rank].exitcode}")
                if not answers[rank][0] and not failed:  # the others may fail of it; give them a moment
                    failed, deadline = True, min(deadline, time.monotonic() + 5)
        for rank in waiting.values():
            answers[rank] = (False, "did not return. Its stacks:\n" + self._stacks(rank))
        if any(not good for good, _ in answers.values()):
            messages = [f"--- rank {rank}: {what}" for rank, (good, what) in sorted(answers.items()) if not good]
            raise RankFailure("\n".join(messages))
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def _stacks(self, rank: int) -> str:
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
        path = Path(self._scratch.name) / f"stacks{rank}"
        return path.read_text() if path.exists() else ""


class Pool:
    """The sets of ranks of this process, by their number; those that have not been used for longest are ended first."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._living: OrderedDict[int, Ranks] = OrderedDict()

    def run(self, world: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, isolated: bool) -> list[Any]:
        """The answers of all ranks. isolated: of ranks that are started for this alone."""
        ranks = None if isolated else self._living.pop(world, None)
        if ranks is not None and not ranks.ready():
            ranks.end()
            ranks = None
        ranks = ranks or Ranks(self._context, world)
        try:
            answers = ranks.run(function, args, timeout)
        except BaseException:
            ranks.end()
            raise
        if isolated:
            ranks.end()
            return answers
        self._living[world] = ranks
        while len(self._living) > MOST:
            self._living.popitem(last=False)[1].end()
        return answers

    def end(self) -> None:
        while self._living:
            self._living.popitem()[1].end()


def _serve(rank: int, world: int, scratch: str, pipe: Connection) -> None:
    """What a rank's process does until the other end of its pipe is closed."""
    with open(f"{scratch}/stacks{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(1)
        start = Start()
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                number, folder, sys.path[:], what = pipe.recv()
                store = f"{scratch}/store{number}"
                pipe.send(_one_run(rank, world, store, pipe, folder, what, start))


def _one_run(rank: int, world: int, store: str, pipe: Connection, folder: str, what: bytes, start: Start) -> list[str]:
    """Sends the answer, cleans up, and returns what is left behind."""
    try:
        os.chdir(folder)
        function, args = pickle.loads(what)
        start.again()
        shared = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=world, timeout=timedelta(seconds=45))
        dist.barrier()  # a rank that destroyed the group at once would cut off those that are still connecting
        before = State()
        pipe.send((True, function(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return ["a failure"]
    del shared, function, args
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    return before.left_behind()
