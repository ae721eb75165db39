"""Determines which rank failed and why, from entries that ranks write to the rendezvous store.

    beat/3      rank 3's process, activity, heartbeat count        stopped/3   its process was found stopped
    failed/3    the exception that ends it                         waits/3     it waits for other ranks
    ended/3     it received SIGTERM                                informed/3  it has read what it needs
    left/3      it has finished normally                           failure     some rank has failed

The key of each kind lists the ranks that have written one, so reading all of them takes two requests and not one for every
rank. Exceptions count first, and processes of this host that have ended or been stopped; then silence, for which heartbeat
counts are compared, not times, so clocks need not agree; and last ranks that ended, left, or are alive but elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringattn.faults import procfs as process

BEAT = 0.4  # seconds
SILENT = 3 * BEAT  # without a new beat a rank is dead, or stopped
GRACE = 1.4  # seconds after which a rank that still waits, though another has failed, is ended
INFORMED = GRACE + 2 * BEAT  # seconds until such a rank has read who failed: a beat to learn of it, and one to notice the time
IDLE = "outside of transfers"

State = dict[str, Any]
Failed = Mapping[int, State]  # by rank


@dataclass(frozen=True)
class HealthStore:
    """The entries of all ranks, as one of them reads and writes them. All methods raise `RuntimeError` when the store is gone,
    and wait for as long as the store does not answer."""

    store: Any  # of torch.distributed
    rank: int
    world: int
    _kinds: set[str] = field(default_factory=set)  # that this rank has written

    def put(self, kind: str, state: State | None = None, rank: int | None = None) -> None:
        rank = self.rank if rank is None else rank
        self.store.set(f"{kind}/{rank}", json.dumps(state or {}))
        if kind not in self._kinds or rank != self.rank:
            self.store.append(kind, f"{rank} ")
            self._kinds.add(kind)

    def fail(self, state: State) -> None:
        self.put("failed", state)
        self.store.set("failure", "1")

    def failure(self) -> bool:
        return bool(self.store.check(["failure"]))

    def find_failures(self) -> Failed:
        """The ranks that have failed; takes up to 2 x `SILENT` seconds."""
        self.put("waits")
        before, until = self._read("beat"), time.monotonic() + SILENT
        while not (failed := self.known_failures()) and time.monotonic() < until:
            time.sleep(BEAT / 5)
        failed = failed or self._missing(lambda beat: beat in before.values()) or self._read("ended")
        return failed or self._missing(lambda beat: beat["doing"] == IDLE) or self._read("left")

    def known_failures(self) -> Failed:
        """Ranks that have reported an exception, or whose processes have ended or been stopped."""
        return self._read("failed") or self._halted()

    def ended_ranks(self) -> Failed:
        """Ranks whose process on this host has ended without reporting an exception."""
        missing = self._missing(lambda beat: True)
        return {rank: beat for rank, beat in missing.items() if process.state(beat) in process.ENDED}

    def acknowledge(self, failed: Iterable[int]) -> None:
        """Record that this rank has read what it needs. Rank 0 may host the store, so it waits until the others have too."""
        self.store.set("failure", "1")
        self.put("waits")  # so that others do not count this rank as failed
        self.put("informed")
        if self.rank == 0:
            others, until = {*range(1, self.world)} - {*failed}, time.monotonic() + INFORMED
            while others - self._ranks("informed") - self._ranks("left") - self._ranks("ended") and time.monotonic() < until:
                time.sleep(BEAT / 5)

    def _halted(self) -> Failed:
        """Ranks of this host whose process has ended or been stopped, and those that other ranks found stopped.

        A stopped process is recorded for the others and then killed: the job is lost, and it would keep its memory and ports.
        """
        states = {rank: beat | {"state": process.state(beat)} for rank, beat in self._missing(lambda beat: True).items()}
        halted = {rank: state for rank, state in states.items() if state["state"] in (*process.ENDED, *process.STOPPED)}
        for rank, state in halted.items():
            if state["state"] in process.STOPPED:
                self.put("stopped", state, rank)
                with contextlib.suppress(OSError):  # another rank may have killed it
                    os.kill(state["pid"], signal.SIGKILL)
        return halted | self._read("stopped")  # read last: another rank may have recorded it

    def _missing(self, is_missing: Callable[[State], bool]) -> dict[int, State]:
        """The ranks for which `is_missing` holds, except those that have left, ended, or wait for others themselves."""
        excused = self._ranks("left") | self._ranks("ended") | self._ranks("waits")
        return {rank: beat for rank, beat in self._read("beat").items() if rank not in excused and is_missing(beat)}

    def _read(self, kind: str) -> dict[int, State]:
        ranks = sorted(self._ranks(kind))
        entries = self.store.multi_get([f"{kind}/{rank}" for rank in ranks]) if ranks else []
        return {rank: json.loads(entry) for rank, entry in zip(ranks, entries, strict=True)}

    def _ranks(self, kind: str) -> set[int]:
        """The other ranks that have written an entry of this kind."""
        return set(map(int, self.store.get(kind).split())) - {self.rank} if self.store.check([kind]) else set()


def describe_failures(failed: Failed) -> str:
    """Text that names the failed ranks and the causes; empty if none has failed."""
    return "; ".join(f"rank {rank} ({state['host']}, pid {state['pid']}) {_cause(state)}" for rank, state in failed.items())


def _cause(state: State) -> str:
    if "cause" in state:
        return f"failed {state['doing']}: {state['cause']}"
    letter = process.state(state)
    if "how" in state:
        how = state["how"]
    elif letter in process.ENDED:
        how = "has died"
    elif letter in process.STOPPED:
        how = "has stalled"
    else:
        how = "has died or stalled" if letter == process.UNKNOWN else "has not come"
    return f"{how}; its last heartbeat was {state['doing']}"
