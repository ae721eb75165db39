"""Watches transfers and reports which rank failed, where and why, through entries of all ranks in the rendezvous store.

A backend's error names no rank: "Connection closed by peer" is raised for a neighbour that gave up as well as for the rank that
died first. So each rank writes a heartbeat to the store several times a second, with its current activity; writes the exception
that ends it; and when a transfer fails, determines which rank caused it (see `diagnosis`). Without a failure no entry is read.

Two threads do this. One writes and reads entries, over its own connection to the store. The other ends this process, stacks
dumped, when the store reports a failure and the main thread still waits for a transfer, as a rank may whose own neighbours are
alive; it also handles a SIGTERM that arrives meanwhile (see `sigterm`). It limits how long it waits for the store, as the host
of the store may have been stopped.
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
from ringattn.faults.diagnosis import BEAT, GRACE, IDLE, INFORMED, SILENT, Failed, HealthStore, State, describe_failures
from ringattn.faults.event_log import note
from ringattn.faults.pending import PendingTransfers, Posted
from ringattn.faults.sigterm import SigtermHandler

ANSWER = 2 * SILENT + 0.2  # seconds to wait for an answer of the store
LEAVING = 10.0  # seconds in which a process must end after a CommError: other threads may wait for the same peer
STUCK = 2.0  # seconds after which a rank whose GPU waits for the same transfer checks whether another rank has died
PATIENCE = 2.0  # seconds in which a rank that received SIGTERM may report which rank it waits for
EXIT_CODE = 75  # of a process that the watchdog ends; EX_TEMPFAIL: try again

# Text of backends' errors that another rank has caused. gloo's come from its TCP transport; NCCL's from torch's
# csrc/distributed/c10d (NCCLUtils.cpp, ProcessGroupNCCL.cpp) and from ncclGetErrorString.
LOST_PEER = (
    *("closed by peer", "Connection reset", "Timed out waiting", "Broken pipe"),
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "remote process exited or there was a network error",
    "unexpected exit of a remote peer",
    "Watchdog caught collective operation timeout",
    "Some NCCL operations have failed or timed out",
    "NCCL watchdog thread terminated",
    "retrieving ncclUniqueId from",  # a rank was missing where NCCL creates its communicator
)

_watchdogs: WeakKeyDictionary[dist.ProcessGroup, Watchdog] = WeakKeyDictionary()  # of the default group; ends with it


def watch() -> None:
    """Start the watchdog of the default group, once. All ranks should call it."""
    world = dist.group.WORLD
    if world is not None and dist.get_world_size() > 1 and world not in _watchdogs:
        own: Any = _get_process_group_store(world)
        _watchdogs[world] = Watchdog(
            HealthStore(PrefixStore("ringattn/health", own.clone()), dist.get_rank(), dist.get_world_size())
        )
        _watchdogs[world].begin()


def watchdog() -> Watchdog | None:
    """The watchdog of the default group, if it has been started."""
    world = dist.group.WORLD if dist.is_initialized() else None
    return None if world is None else _watchdogs.get(world)


class comm_errors(AbstractContextManager[None]):
    """Context in which a rank waits for other ranks; errors of the backend become `CommError`. A class for speed.

    doing, about: the activity that other ranks can read meanwhile. failed: the message of the `CommError`, with {about} filled
    in; the ranks that caused it follow if they are known. active: the result of `watchdog()`, for callers that enter often.
    """

    __slots__ = ("_about", "_active", "_doing", "_failed")

    def __init__(self, doing: str, failed: str, about: object = "", active: Watchdog | EllipsisType | None = ...) -> None:
        self._doing, self._failed, self._about = doing, failed, about
        self._active = watchdog() if isinstance(active, EllipsisType) else active

    def __enter__(self) -> None:
        if self._active is not None:
            self._active.doing = (self._doing, self._about)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, RingAttnError):
                raise CommError(self._message(error)) from error
        finally:
            if self._active is not None:
                self._active.doing = None

    def _message(self, error: RuntimeError) -> str:
        culprit = self._active.explain() if self._active is not None else ""
        message = f"{self._failed.format(about=self._about)}{f': {culprit}' if culprit else ''}. The backend says: {error}"
        note("failed", error=message)
        return message


def follow(
    works: Sequence[Any], group: dist.ProcessGroup | None, device: torch.device, finished: Callable[[], None] | None = None
) -> None:
    """Watch transfers that have just been posted and whose `wait` returns at once, until their works are complete.

    finished: called by the watching thread then. Does nothing where no watchdog has been started.
    """
    if active := watchdog():
        active.pending.add(active.doing or ("in a transfer",), works, group, device, finished)


@dataclass
class Watchdog:
    """The watchdog of one rank.

    doing: what the main thread waits for, and the pass it belongs to; None outside transfers. pending: posted transfers that
    the GPU may still wait for; behind: the oldest of them at the last poll. lost: whether a transfer has failed, so that this
    rank now determines the cause, reports it, and ends.
    """

    health: HealthStore
    doing: tuple[Any, ...] | None = None
    pending: PendingTransfers = field(default_factory=PendingTransfers)
    behind: tuple[Any, ...] | None = None
    lost: bool = False
    beats: int = 0
    _failure: bool = False  # whether the store reported one, at the last beat
    _ended_ranks: set[int] = field(default_factory=set)  # ranks of this host, at the last beat; checked only when stuck
    _answering: bool = False  # a question, which may take long
    _answered: float = field(default_factory=time.monotonic)  # when the store last answered
    _leaves_at: float = math.inf
    _sigterm: SigtermHandler = field(default_factory=SigtermHandler)
    _questions: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue)
    _closed: threading.Event = field(default_factory=threading.Event)
    _group: Any = field(default_factory=lambda: ref(dist.group.WORLD))

    def begin(self) -> None:
        os.register_at_fork(after_in_child=self._closed.set)  # a child has neither a rank nor its own connection
        self.health.put("beat", self._state())
        for part in (self._write, self._watch):
            threading.Thread(target=part, name="ringattn watchdog", daemon=True).start()
        before = sys.excepthook

        def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if isinstance(error, CommError):
                self._leaves_at = time.monotonic() + LEAVING
            elif _caused_by_lost_peer(error):  # in a collective outside of this library
                self._leaves_at = time.monotonic() + LEAVING
                print(f"rank {self.health.rank}: {self.explain()}", file=sys.stderr, flush=True)
            else:
                self.report(f"{kind.__name__}: {error}")
            before(kind, error, trace)

        sys.excepthook = report
        atexit.register(self.end)

    def end(self) -> None:
        """Record that this rank has finished normally."""
        state = {**self._state(), "how": "has left in good order and will not come"}
        self._ask(partial(self.health.put, "left", state), None)
        self._closed.set()
        self._sigterm.deactivate()

    def report(self, cause: str) -> None:
        """Record that this rank fails, and why."""
        note("failed", error=cause)
        self._ask(partial(self.health.fail, {**self._state(), "cause": cause}), None)

    def explain(self) -> str:
        """Text that names the ranks that have failed and why; empty if unknown. Takes up to six seconds."""
        self.doing, self.lost = None, True
        no_answer = (
            "the store does not answer: what hosts it (torchrun's agent, or else rank 0) has ended, is stopped or out of reach"
        )
        unknown: Failed | None = None
        if (failed := self._ask(self.health.find_failures, unknown)) is None:
            return no_answer
        # By itself: where rank 0 hosts the store, it may end as soon as it has read this, before the reply to it arrives.
        self._ask(partial(self.health.acknowledge, failed), None, INFORMED + BEAT)
        return describe_failures(failed)

    def _write(self) -> None:
        """The thread that writes heartbeats. Only it uses the store: it also runs the questions of other threads."""
        with contextlib.suppress(RuntimeError):  # the store's host has ended; a failed transfer will report it
            while self._in_group() and not self._closed.is_set():
                try:
                    question = self._questions.get(timeout=BEAT)
                except Empty:
                    self.beats += 1
                    self.health.put("beat", self._state())
                    self._failure = (self.doing or self.behind) is not None and self.health.failure()
                    self._ended_ranks = set(self.health.ended_ranks()) if self.pending.seconds() > STUCK else set()
                else:
                    self._answering = True
                    question()
                    self._answering = False
                self._answered = time.monotonic()
        self._closed.set()

    def _watch(self) -> None:
        activity, since = None, 0.0
        try:
            while self._in_group():
                self._sigterm.wait(BEAT)
                oldest = self.pending.oldest()
                self.behind = oldest.doing if oldest else None
                doing = self.doing or self.behind
                if doing is None or doing is not activity:
                    activity, since = doing, time.monotonic()
                if self._sigterm.received:
                    self._end_on_sigterm(doing)
                elif doing and self._failure and time.monotonic() - since > GRACE:
                    self._end_process(f"{_activity(doing)} will not end: {self.explain()}")
                elif oldest and self._is_lost(oldest):
                    self._end_process(f"{_activity(oldest.doing)} will not end: {self.explain()}")
                elif time.monotonic() > self._leaves_at:
                    self._end_process(f"no end {LEAVING:.0f} s after its error; see which thread it waits for")
            if self._sigterm.received:
                self._sigterm.end_process(f"rank {self.health.rank}: told to end (SIGTERM)")
        finally:
            self._closed.set()
            self._sigterm.deactivate()
            self.pending.clear()

    def _is_lost(self, oldest: Posted) -> bool:
        """Whether to give up what the GPU waits for. Without this, NCCL's deadline would end the process without an error."""
        members = self._ended_ranks and set(dist.get_process_group_ranks(oldest.group))
        return bool(members and members & self._ended_ranks) or time.monotonic() > oldest.deadline

    def _end_on_sigterm(self, doing: tuple[Any, ...] | None) -> None:
        """End after SIGTERM; if it was sent because another rank has failed, name that rank."""
        message = f"told to end (SIGTERM) {_activity(doing)}"
        none: Failed = {}
        if not self.lost and (failed := self._ask(self.health.known_failures, none, PATIENCE / 2)):
            self._ask(partial(self.health.acknowledge, failed), None)
            self._end_process(f"{message}: {describe_failures(failed)}")
        waits = not self._closed.is_set() and (doing is not None or self.lost)
        if self._sigterm.received_before(PATIENCE if waits else 0.0):
            ended = {**self._state(), "how": "was told to end (SIGTERM)"}
            self._ask(partial(self.health.put, "ended", ended), None, PATIENCE / 2)
            self._sigterm.end_process(f"rank {self.health.rank}: {message}")

    def _end_process(self, why: str) -> NoReturn:
        try:
            message = f"rank {self.health.rank}: {why}"
            note("failed", error=message)
            print(message, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        finally:  # also where stderr is closed
            os._exit(EXIT_CODE)

    def _state(self) -> State:
        return {**process.own(), "beats": self.beats, "doing": _activity(self.doing or self.behind)}

    def _in_group(self) -> bool:
        """Whether the default group still exists; without it the store may be gone."""
        return dist.is_initialized() and dist.group.WORLD is self._group()

    def _ask(self, question: Callable[[], Any], otherwise: Any, seconds: float = ANSWER) -> Any:
        """The store's answer; `otherwise` if closed, if the store is gone, or without an answer in time, which closes this."""
        answers: list[Any] = []
        self._questions.put(lambda: answers.append(question()))
        now = time.monotonic()
        stuck = not self._answering and now - self._answered > ANSWER  # not even a heartbeat was written
        deadline = now + (min(seconds, 2 * BEAT) if stuck else seconds)
        while not answers and not self._closed.wait(0.01):
            if time.monotonic() > deadline or not self._in_group():
                self._closed.set()
        return answers[0] if answers else otherwise


def _caused_by_lost_peer(error: BaseException) -> bool:
    """Whether `error` is a backend's error that another rank has caused."""
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST_PEER)


def _activity(doing: tuple[Any, ...] | None) -> str:
    return " ".join(str(part) for part in doing if part != "") if doing else IDLE
