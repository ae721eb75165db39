"""Who failed, where and why: a board in the rendezvous store, which every rank writes on and reads when a wait fails.

A backend's error names no rank: "Connection closed by peer" is said of the neighbour that gave up as of the one that died
first. So each rank beats on the board, several times a second, saying what it is doing; writes down the exception that ends
it; and when a transfer fails, looks whose fault it is (see `blame`). Nobody reads anything while all goes well.

A thread does the beating, over a connection of its own. It also ends this process, stacks dumped, when the board tells of a
failure and the main thread still waits for a transfer, as a rank may whose own neighbours are alive; and it sees to a SIGTERM
that comes meanwhile (see `farewell`).
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from ringattn.comm import process
from ringattn.comm.blame import BEAT, IDLE, Failed, Notices, State, named
from ringattn.comm.farewell import Farewell
from ringattn.comm.journal import note
from ringattn.errors import CommError, RingAttnError

GRACE = 1.4  # seconds after which a rank that still waits, though another has failed, is ended
LEAVING = 10.0  # in which a process that a CommError ends must have ended: other threads may wait for the same peer
PATIENCE = 2.0  # in which a rank that is told to end may say whom it misses
EXIT_CODE = 75  # of a process ended here; EX_TEMPFAIL: try again

_boards: WeakKeyDictionary[dist.ProcessGroup, Board] = WeakKeyDictionary()  # of the default group; ends with it


def watch() -> None:
    """Put this rank on the board of the default group, once; collective in effect, since all ranks should be on it."""
    world = dist.group.WORLD
    if world is not None and dist.get_world_size() > 1 and world not in _boards:
        own: Any = _get_process_group_store(world)
        _boards[world] = Board(Notices(PrefixStore("ringattn/board", own.clone()), dist.get_rank(), dist.get_world_size()))
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

    notices: Notices
    doing: tuple[Any, ...] | None = None
    lost: bool = False
    beats: int = 0
    _leaves_at: float = math.inf
    _farewell: Farewell = field(default_factory=Farewell)
    _closed: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        os.register_at_fork(after_in_child=self._closed.set)  # a child has neither a rank nor a connection of its own
        self._put("beat", self._state())
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
        self._put("left")
        self._closed.set()
        self._farewell.forget()

    def report(self, cause: str) -> None:
        """This rank fails, for a reason of its own."""
        note("failed", error=cause)
        self._put("failed", {**self._state(), "cause": cause})
        self._open(lambda: self.notices.store.set("failure", "1"), None)

    def explain(self) -> str:
        """Which ranks have failed and why, in words; empty where it can't be told. Takes up to three seconds."""
        self.doing, self.lost = None, True
        try:
            return named(self.notices.find())
        except RuntimeError:
            return "the store is gone too, and with it the process that hosts it: torchrun's agent, or else rank 0"

    def _live(self) -> None:
        waited, since = None, 0.0
        while dist.is_initialized():  # then the job is done, and with it perhaps the store
            self._farewell.wait(BEAT)
            self.beats += 1
            doing = self.doing
            self._put("beat", self._state())
            if doing is None or doing is not waited:
                waited, since = doing, time.monotonic()
            if self._farewell.told:
                self._end_as_told(doing)
            elif doing and time.monotonic() - since > GRACE and self._open(self.notices.failure, False):
                self._leave(f"{_words(doing)} will not end: {self.explain()}")
            elif time.monotonic() > self._leaves_at:
                self._leave(f"no end {LEAVING:.0f} s after its error; see which thread it waits for")
        self._closed.set()
        self._farewell.forget()

    def _end_as_told(self, doing: tuple[Any, ...] | None) -> None:
        """By SIGTERM; but if it comes because another rank has failed, with that rank's name."""
        said = f"told to end (SIGTERM) {_words(doing)}"
        self._put("waits")  # for others: this rank does not end for a reason of its own
        nobody: Failed = {}
        if not self.lost and (failed := self._open(self.notices.known, nobody)):
            self._open(lambda: self.notices.heard(failed), None)
            self._leave(f"{said}: {named(failed)}")
        waits = not self._closed.is_set() and (doing is not None or self.lost)
        if self._farewell.due(PATIENCE if waits else 0.0):
            self._farewell.take(f"rank {self.notices.rank}: {said}")

    def _leave(self, why: str) -> NoReturn:
        said = f"rank {self.notices.rank}: {why}"
        note("failed", error=said)
        print(said, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)

    def _state(self) -> State:
        return {**process.own(), "beats": self.beats, "doing": _words(self.doing)}

    def _put(self, kind: str, said: State | None = None) -> None:
        self._open(lambda: self.notices.put(kind, said), None)

    def _open(self, action: Callable[[], Any], otherwise: Any) -> Any:
        """What `action` finds on the board; `otherwise` if it is closed, or the store's host has gone."""
        try:
            return otherwise if self._closed.is_set() else action()
        except RuntimeError:  # whoever waits for a peer will say so
            self._closed.set()
            return otherwise


def _words(doing: tuple[Any, ...] | None) -> str:
    return " ".join(str(part) for part in doing if part != "") if doing else IDLE
