"""Who failed, where and why: a board in the rendezvous store, which every rank writes on and reads when a wait fails.

A backend's error names no rank: "Connection closed by peer" is said of the neighbour that gave up as of the one that died
first. So each rank beats on the board, several times a second, saying what it is doing; writes down the exception that ends
it; and when a transfer fails, looks whose fault it is (see `blame`). Nobody reads anything while all goes well.

Two threads serve it. One beats and reads, over a connection of its own. The other ends this process, stacks dumped, when the
board tells of a failure and the main thread still waits for a transfer, as a rank may whose own neighbours are alive; and it
sees to a SIGTERM that comes meanwhile (see `farewell`). It never waits for the store longer than it should, as the host of the
store may have been stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from types import EllipsisType, TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from ringattn.errors import CommError, RingAttnError
from ringattn.faults import procfs as process
from ringattn.faults.diagnosis import BEAT, IDLE, SILENT, Failed, Notices, State, named
from ringattn.faults.event_log import note
from ringattn.faults.pending import Posted, Unfinished
from ringattn.faults.sigterm import Farewell

ANSWER = 2 * SILENT + 0.2  # seconds that whoever asks the board waits for an answer
GRACE = 1.4  # seconds after which a rank that still waits, though another has failed, is ended
LEAVING = 10.0  # in which a process that a CommError ends must have ended: other threads may wait for the same peer
STUCK = 2.0  # after which a rank whose GPU waits for the same transfer looks whether another has died
PATIENCE = 2.0  # in which a rank that is told to end may say whom it misses
EXIT_CODE = 75  # of a process ended here; EX_TEMPFAIL: try again

# Words of backends' errors that another rank has caused. gloo's come from its TCP transport; NCCL's from torch's
# csrc/distributed/c10d (NCCLUtils.cpp, ProcessGroupNCCL.cpp) and from ncclGetErrorString.
LOST = (
    *("closed by peer", "Connection reset", "Timed out waiting", "Broken pipe"),
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "remote process exited or there was a network error",
    "unexpected exit of a remote peer",
    "Watchdog caught collective operation timeout",
    "Some NCCL operations have failed or timed out",
    "NCCL watchdog thread terminated",
    "retrieving ncclUniqueId from",  # a rank did not come where NCCL makes its communicator
)

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


class transferring(AbstractContextManager[None]):
    """Around whatever waits for other ranks. A class and no generator: it is entered for every transfer.

    doing, about: what the others can read while it lasts. failed: what the `CommError` says that an error of the backend
    becomes, with {about} filled in, followed by whose fault it is if the board tells. here: what `board()` returns, for callers
    that ask once and come often.
    """

    __slots__ = ("_about", "_doing", "_failed", "_here")

    def __init__(self, doing: str, failed: str, about: object = "", here: Board | EllipsisType | None = ...) -> None:
        self._doing, self._failed, self._about = doing, failed, about
        self._here = board() if isinstance(here, EllipsisType) else here

    def __enter__(self) -> None:
        if self._here is not None:
            self._here.doing = (self._doing, self._about)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, RingAttnError):
                raise CommError(self._explained(error)) from error
        finally:
            if self._here is not None:
                self._here.doing = None

    def _explained(self, error: RuntimeError) -> str:
        culprit = self._here.explain() if self._here is not None else ""
        said = f"{self._failed.format(about=self._about)}{f': {culprit}' if culprit else ''}. The backend says: {error}"
        note("failed", error=said)
        return said


def follow(
    works: Sequence[Any], group: dist.ProcessGroup | None, device: torch.device, finished: Callable[[], None] | None = None
) -> None:
    """Watch transfers that have just been posted and whose `wait` returns at once, until their works are complete.

    finished: called by the watching thread then. Nothing is watched where the rank is on no board.
    """
    if here := board():
        here.unfinished.add(here.doing or ("in a transfer",), works, group, device, finished)


@dataclass
class Board:
    """One rank's access. doing: what the main thread waits for, and the pass it belongs to; None outside transfers.
    unfinished: what it has posted and its GPU may still wait for; behind: the oldest of that, as the watching thread found it.
    lost: whether a transfer has failed, so that it now finds out whose fault that is, says so, and ends."""

    notices: Notices
    doing: tuple[Any, ...] | None = None
    unfinished: Unfinished = field(default_factory=Unfinished)
    behind: tuple[Any, ...] | None = None
    lost: bool = False
    beats: int = 0
    _failure: bool = False  # whether the board told of one, at the last beat
    _died: set[int] = field(default_factory=set)  # ranks of this host, as of the last beat; looked for only when stuck
    _answering: bool = False  # a question, which may take its time
    _answered: float = field(default_factory=time.monotonic)  # when the store did so last
    _leaves_at: float = math.inf
    _farewell: Farewell = field(default_factory=Farewell)
    _questions: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue)
    _closed: threading.Event = field(default_factory=threading.Event)
    _group: Any = field(default_factory=lambda: ref(dist.group.WORLD))

    def begin(self) -> None:
        os.register_at_fork(after_in_child=self._closed.set)  # a child has neither a rank nor a connection of its own
        self.notices.put("beat", self._state())
        for part in (self._write, self._watch):
            threading.Thread(target=part, name="ringattn board", daemon=True).start()
        before = sys.excepthook

        def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if isinstance(error, CommError):
                self._leaves_at = time.monotonic() + LEAVING
            elif _is_of_a_lost_peer(error):  # in a collective of somebody else's
                self._leaves_at = time.monotonic() + LEAVING
                print(f"rank {self.notices.rank}: {self.explain()}", file=sys.stderr, flush=True)
            else:
                self.report(f"{kind.__name__}: {error}")
            before(kind, error, trace)

        sys.excepthook = report
        atexit.register(self.end)

    def end(self) -> None:
        """This rank leaves in good order; it is neither dead nor waited for."""
        said = {**self._state(), "how": "has left in good order and will not come"}
        self._ask(partial(self.notices.put, "left", said), None)
        self._closed.set()
        self._farewell.forget()

    def report(self, cause: str) -> None:
        """This rank fails, for a reason of its own."""
        note("failed", error=cause)
        self._ask(partial(self.notices.fail, {**self._state(), "cause": cause}), None)

    def explain(self) -> str:
        """Which ranks have failed and why, in words; empty where it can't be told. Takes up to three seconds."""
        self.doing, self.lost = None, True
        gone = (
            "the store does not answer: what hosts it (torchrun's agent, or else rank 0) has ended, is stopped or out of reach"
        )
        found: str = self._ask(lambda: named(self.notices.find()), gone)
        return found

    def _write(self) -> None:
        """The thread that beats, and alone touches the store: asks it what others want to know, and answers them."""
        with contextlib.suppress(RuntimeError):  # the store's host has gone; whoever waits for a peer will say so
            while self._in_group() and not self._closed.is_set():
                try:
                    question = self._questions.get(timeout=BEAT)
                except Empty:
                    self.beats += 1
                    self.notices.put("beat", self._state())
                    self._failure = (self.doing or self.behind) is not None and self.notices.failure()
                    self._died = set(self.notices.died()) if self.unfinished.seconds() > STUCK else set()
                else:
                    self._answering = True
                    question()
                    self._answering = False
                self._answered = time.monotonic()
        self._closed.set()

    def _watch(self) -> None:
        waited, since = None, 0.0
        try:
            while self._in_group():
                self._farewell.wait(BEAT)
                oldest = self.unfinished.oldest()
                self.behind = oldest.doing if oldest else None
                doing = self.doing or self.behind
                if doing is None or doing is not waited:
                    waited, since = doing, time.monotonic()
                if self._farewell.told:
                    self._end_as_told(doing)
                elif doing and self._failure and time.monotonic() - since > GRACE:
                    self._leave(f"{_words(doing)} will not end: {self.explain()}")
                elif oldest and self._is_lost(oldest):
                    self._leave(f"{_words(oldest.doing)} will not end: {self.explain()}")
                elif time.monotonic() > self._leaves_at:
                    self._leave(f"no end {LEAVING:.0f} s after its error; see which thread it waits for")
            if self._farewell.told:
                self._farewell.take(f"rank {self.notices.rank}: told to end (SIGTERM)")
        finally:
            self._closed.set()
            self._farewell.forget()
            self.unfinished.clear()

    def _is_lost(self, oldest: Posted) -> bool:
        """Whether to give up what the GPU waits for. No error is raised for it before NCCL's own deadline ends the process."""
        members = self._died and set(dist.get_process_group_ranks(oldest.group))
        return bool(members and members & self._died) or time.monotonic() > oldest.deadline

    def _end_as_told(self, doing: tuple[Any, ...] | None) -> None:
        """By SIGTERM; but if it comes because another rank has failed, with that rank's name."""
        said = f"told to end (SIGTERM) {_words(doing)}"
        nobody: Failed = {}
        if not self.lost and (failed := self._ask(self.notices.known, nobody, PATIENCE / 2)):
            self._ask(partial(self.notices.heard, failed), None)
            self._leave(f"{said}: {named(failed)}")
        waits = not self._closed.is_set() and (doing is not None or self.lost)
        if self._farewell.due(PATIENCE if waits else 0.0):
            ended = {**self._state(), "how": "was told to end (SIGTERM)"}
            self._ask(partial(self.notices.put, "ended", ended), None, PATIENCE / 2)
            self._farewell.take(f"rank {self.notices.rank}: {said}")

    def _leave(self, why: str) -> NoReturn:
        try:
            said = f"rank {self.notices.rank}: {why}"
            note("failed", error=said)
            print(said, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        finally:  # also where stderr is gone
            os._exit(EXIT_CODE)

    def _state(self) -> State:
        return {**process.own(), "beats": self.beats, "doing": _words(self.doing or self.behind)}

    def _in_group(self) -> bool:
        """Whether the job goes on, and so perhaps the store."""
        return dist.is_initialized() and dist.group.WORLD is self._group()

    def _ask(self, question: Callable[[], Any], otherwise: Any, seconds: float = ANSWER) -> Any:
        """The board's answer; `otherwise` if it is closed, its store is gone, or none comes in time, which closes it."""
        answers: list[Any] = []
        self._questions.put(lambda: answers.append(question()))
        now = time.monotonic()
        stuck = not self._answering and now - self._answered > ANSWER  # not even a beat has come through
        until = now + (min(seconds, 2 * BEAT) if stuck else seconds)
        while not answers and not self._closed.wait(0.01):
            if time.monotonic() > until or not self._in_group():
                self._closed.set()
        return answers[0] if answers else otherwise


def _is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether it is a backend's error that another rank has caused."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def _words(doing: tuple[Any, ...] | None) -> str:
    return " ".join(str(part) for part in doing if part != "") if doing else IDLE
