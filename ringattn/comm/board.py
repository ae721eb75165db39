"""Who failed, where and why: a board in the rendezvous store, which every rank writes on and reads when a wait fails.

A backend's error names no rank: "Connection closed by peer" is said of the neighbour that gave up as of the one that died
first. So each rank beats on the board, several times a second, saying what it is doing; writes down the exception that ends
it; and when a transfer fails, looks who has written and whose heart has stopped. Counts of beats are compared, not times, so
clocks need not agree, and nobody reads anything while all goes well.

A thread does the beating, over a connection of its own. It also ends this process, stacks dumped, when the board tells of a
failure and the main thread still waits for a transfer, as a rank may whose own neighbours are alive; and it sees to a SIGTERM
that comes meanwhile (see `farewell`). A rank of this host that is stopped (SIGSTOP) is killed by the first who names it: the
job is lost, and a stopped process would keep its memory and its ports, and torchrun's agent waiting for 30 seconds.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_process_group_store

from ringattn.comm import process
from ringattn.comm.farewell import Farewell
from ringattn.comm.journal import note
from ringattn.errors import CommError, RingAttnError

BEAT = 0.4  # seconds
SILENT = 3 * BEAT  # without a new beat a rank is dead, or stopped
GRACE = 1.4  # after which a rank that still waits, though another has failed, is ended
LEAVING = 10.0  # in which a process that a CommError ends must have ended: other threads may wait for the same peer
PATIENCE = 2.0  # in which a rank that is told to end may say whom it misses
IDLE = "outside of transfers"
EXIT_CODE = 75  # of a process ended here; EX_TEMPFAIL: try again

State = dict[str, Any]

_boards: WeakKeyDictionary[dist.ProcessGroup, Board] = WeakKeyDictionary()  # of the default group; ends with it


def watch() -> None:
    """Put this rank on the board of the default group, once; collective in effect, since all ranks should be on it."""
    world = dist.group.WORLD
    if world is not None and dist.get_world_size() > 1 and world not in _boards:
        own: Any = _get_process_group_store(world)
        _boards[world] = Board(PrefixStore("ringattn/board", own.clone()), dist.get_rank())
        _boards[world].begin()


def board() -> Board | None:
    """That of the default group, if it is being watched."""
    world = dist.group.WORLD if dist.is_initialized() else None
    return None if world is None else _boards.get(world)


@contextmanager
def transferring(doing: str, failed: str, about: object = "") -> Iterator[None]:
    """Around whatever waits for other ranks.

    doing, about: what the others can read while it lasts. failed: what the `CommError` says that an error of the backend
    becomes, with {about} filled in, followed by whose fault it is if the board tells.
    """
    here = board()
    if here:
        here.doing = (doing, about)
    try:
        yield
    except RingAttnError:
        raise
    except RuntimeError as error:
        culprit = here.explain() if here else ""
        said = f"{failed.format(about=about)}{f': {culprit}' if culprit else ''}. The backend says: {error}"
        note("failed", error=said)
        raise CommError(said) from error
    finally:
        if here:
            here.doing = None


@dataclass
class Board:
    """One rank's access. doing: what the main thread waits for, and the pass it belongs to; None outside transfers.
    lost: whether a transfer has failed, so that it now finds out whose fault that is, says so, and ends."""

    store: Store
    rank: int
    world: int = field(default_factory=lambda: dist.get_world_size())
    doing: tuple[Any, ...] | None = None
    lost: bool = False
    beats: int = 0
    _leaves_at: float = math.inf
    _farewell: Farewell = field(default_factory=Farewell)
    _ended: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        os.register_at_fork(after_in_child=self._ended.set)  # a child has neither a rank nor a connection of its own
        self._write("beat", self._state())
        threading.Thread(target=self._live, name="ringattn board", daemon=True).start()
        before = sys.excepthook

        def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if isinstance(error, CommError):  # which is of another rank's making
                self._leaves_at = time.monotonic() + LEAVING
            else:
                self.report(f"{kind.__name__}: {error}")
            before(kind, error, trace)

        sys.excepthook = report
        atexit.register(self.end)

    def end(self) -> None:
        """This rank leaves in good order; it is neither dead nor waited for."""
        self._try(lambda: self.store.set(f"left/{self.rank}", "1"))
        self._ended.set()
        self._farewell.forget()

    def report(self, cause: str) -> None:
        """This rank fails, for a reason of its own."""
        note("failed", error=cause)
        self._write("failed", {**self._state(), "cause": cause})
        self._try(lambda: self.store.set("failure", "1"))

    def explain(self) -> str:
        """Which ranks have failed and why, in words; empty where it can't be told. Takes up to 2 x `SILENT` seconds."""
        self.doing, self.lost = None, True
        try:
            return _named(self._find())
        except RuntimeError:
            return "the store is gone too, and with it the process that hosts it: torchrun's agent, or else rank 0"

    def _find(self) -> dict[int, State]:
        """The ranks that have failed, as they were. Raises `RuntimeError` when the store is gone."""
        self._write("waits", {})
        before, until = self._read("beat"), time.monotonic() + SILENT
        while not (failed := self._failed()) and time.monotonic() < until:
            time.sleep(BEAT / 5)
        failed = failed or self._missing(lambda one: one in before.values()) or self._missing(lambda one: one["doing"] == IDLE)
        self._heard(failed)
        return failed

    def _failed(self) -> dict[int, State]:
        """The ranks that have said so, or of which this host or another can tell."""
        return self._read("failed") or self._halted()

    def _halted(self) -> dict[int, State]:
        """Ranks of this host whose process has ended or been stopped, and what others have found so; of other hosts only
        silence tells. Who is stopped is noted for the others, and then killed."""
        states = {rank: one | {"state": process.state(one)} for rank, one in self._missing(lambda one: True).items()}
        halted = {rank: one for rank, one in states.items() if one["state"] in (*process.ENDED, *process.STOPPED)}
        for rank, one in halted.items():
            if one["state"] in process.STOPPED:
                self.store.set(f"stopped/{rank}", json.dumps(one))
                os.kill(one["pid"], signal.SIGKILL)
        return halted | self._read("stopped")  # read last: another rank may have killed it a moment ago

    def _heard(self, failed: Iterable[int]) -> None:
        """This rank has read what it needs. Rank 0 may host the store that the others still have to read: it waits for them."""
        self.store.set("failure", "1")
        self.store.set(f"told/{self.rank}", "1")
        if self.rank == 0:
            others, until = {*range(1, self.world)} - {*failed}, time.monotonic() + SILENT
            while others - {*self._keys("told")} - {*self._keys("left")} and time.monotonic() < until:
                time.sleep(BEAT / 5)

    def _missing(self, is_missing: Callable[[State], bool]) -> dict[int, State]:
        """Of the ranks that neither have left nor wait for others themselves, those of whom `is_missing` says so."""
        excused = {*self._keys("left"), *self._keys("waits")}
        return {rank: one for rank, one in self._read("beat").items() if is_missing(one) and rank not in excused}

    def _live(self) -> None:
        waited, since = None, 0.0
        while dist.is_initialized():  # then the job is done, and with it perhaps the store
            self._farewell.wait(BEAT)
            self.beats += 1
            doing = self.doing
            self._write("beat", self._state())
            if doing is None or doing is not waited:
                waited, since = doing, time.monotonic()
            if self._farewell.told:
                self._end_as_told(doing)
            elif doing and self._failure() and time.monotonic() - since > GRACE:
                self._leave(f"{_words(doing)} will not end: {self.explain()}")
            elif time.monotonic() > self._leaves_at:
                self._leave(f"no end {LEAVING:.0f} s after its error; see which thread it waits for")
        self._ended.set()
        self._farewell.forget()

    def _end_as_told(self, doing: tuple[Any, ...] | None) -> None:
        """By SIGTERM; but if it comes because another rank has failed, with that rank's name."""
        said = f"told to end (SIGTERM) {_words(doing) if doing else IDLE}"
        self._write("waits", {})  # for others: this rank does not end for a reason of its own
        if not self.lost and (failed := self._known()):
            self._leave(f"{said}: {_named(failed)}")
        waits = not self._ended.is_set() and (doing is not None or self.lost)
        if self._farewell.due(PATIENCE if waits else 0.0):
            self._farewell.take(f"rank {self.rank}: {said}")

    def _known(self) -> dict[int, State]:
        """The ranks that are known to have failed, if the board can still be read."""
        try:
            failed = {} if self._ended.is_set() else self._failed()
            if failed:
                self._heard(failed)
            return failed
        except RuntimeError:
            return {}

    def _leave(self, why: str) -> NoReturn:
        said = f"rank {self.rank}: {why}"
        note("failed", error=said)
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)

    def _failure(self) -> bool:
        try:
            return not self._ended.is_set() and bool(self.store.check(["failure"]))
        except RuntimeError:
            return False  # the main thread will hear of it

    def _state(self) -> State:
        doing = self.doing
        said = _words(doing) if doing else IDLE
        return {**process.own(), "beats": self.beats, "doing": said}

    def _write(self, kind: str, said: State) -> None:
        self._try(lambda: self.store.set(f"{kind}/{self.rank}", json.dumps(said)))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            if not self._ended.is_set():
                action()
        except RuntimeError:  # the store's host has gone; whoever waits for a peer will say so
            self._ended.set()

    def _read(self, kind: str) -> dict[int, State]:
        return {rank: json.loads(self.store.get(key)) for rank, key in self._keys(kind).items()}

    def _keys(self, kind: str) -> dict[int, str]:
        """Those that other ranks have written."""
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world) if rank != self.rank}
        return {rank: key for rank, key in keys.items() if self.store.check([key])}


def _named(failed: Mapping[int, State]) -> str:
    return "; ".join(f"rank {rank} ({one['host']}, pid {one['pid']}) {_cause(one)}" for rank, one in failed.items())


def _words(doing: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in doing if part != "")


def _cause(one: State) -> str:
    if "cause" in one:
        return f"failed {one['doing']}: {one['cause']}"
    state = process.state(one)
    if state in process.ENDED:
        how = "has died"
    elif state in process.STOPPED:
        how = "has stalled"
    else:
        how = "has died or stalled" if state == process.UNKNOWN else "has not come"
    return f"{how}; its last heartbeat was {one['doing']}"
