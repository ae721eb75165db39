"""Whose fault it is that a transfer has failed: read from the notices that ranks have put in the rendezvous store.

    beat/3      what rank 3 is, does, and how often it has said so      stopped/3   its process was found stopped
    failed/3    the exception that ends it                              waits/3     it misses others itself
    ended/3     it was told to end                                      told/3      it has read all it needs
    left/3      it left in good order                                   failure     somebody has failed

Under each kind's own name stands which ranks have put one up, so that reading all of them takes two questions and not one for
every rank. First come exceptions and processes of this host that have ended or been stopped; then silence, for which counts of
beats are compared, not times, so that clocks need not agree; and last whoever ended or left, or is alive but elsewhere.
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
IDLE = "outside of transfers"

State = dict[str, Any]
Failed = Mapping[int, State]  # by rank


@dataclass(frozen=True)
class Notices:
    """What ranks have put up, as one of them reads it. All that it does raises `RuntimeError` when the store is gone, and
    waits for as long as the store does not answer."""

    store: Any  # of torch.distributed
    rank: int
    world: int
    _kinds: set[str] = field(default_factory=set)  # that this rank has put up

    def put(self, kind: str, said: State | None = None, rank: int | None = None) -> None:
        rank = self.rank if rank is None else rank
        self.store.set(f"{kind}/{rank}", json.dumps(said or {}))
        if kind not in self._kinds or rank != self.rank:
            self.store.append(kind, f"{rank} ")
            self._kinds.add(kind)

    def fail(self, said: State) -> None:
        self.put("failed", said)
        self.store.set("failure", "1")

    def failure(self) -> bool:
        return bool(self.store.check(["failure"]))

    def find(self) -> Failed:
        """The ranks that have failed; takes up to 2 x `SILENT` seconds."""
        self.put("waits")
        before, until = self._read("beat"), time.monotonic() + SILENT
        while not (failed := self.known()) and time.monotonic() < until:
            time.sleep(BEAT / 5)
        failed = failed or self._missing(lambda one: one in before.values()) or self._read("ended")
        failed = failed or self._missing(lambda one: one["doing"] == IDLE) or self._read("left")
        self.heard(failed)
        return failed

    def known(self) -> Failed:
        """Those that have said so themselves, or of which a host can tell."""
        return self._read("failed") or self._halted()

    def died(self) -> Failed:
        """Ranks whose process on this host has ended without a word."""
        missing = self._missing(lambda one: True)
        return {rank: one for rank, one in missing.items() if process.state(one) in process.ENDED}

    def heard(self, failed: Iterable[int]) -> None:
        """This rank has read what it needs. Rank 0 may host the store that the others still have to read: it waits for them."""
        self.store.set("failure", "1")
        self.put("waits")  # for the others: it does not end for a reason of its own
        self.put("told")
        if self.rank == 0:
            others, until = {*range(1, self.world)} - {*failed}, time.monotonic() + SILENT
            while others - self._ranks("told") - self._ranks("left") - self._ranks("ended") and time.monotonic() < until:
                time.sleep(BEAT / 5)

    def _halted(self) -> Failed:
        """Ranks of this host whose process has ended or been stopped, and what others have found so. Who is stopped is noted
        for the others and then killed: the job is lost, and a stopped process keeps its memory and its ports."""
        states = {rank: one | {"state": process.state(one)} for rank, one in self._missing(lambda one: True).items()}
        halted = {rank: one for rank, one in states.items() if one["state"] in (*process.ENDED, *process.STOPPED)}
        for rank, one in halted.items():
            if one["state"] in process.STOPPED:
                self.put("stopped", one, rank)
                with contextlib.suppress(OSError):  # another has killed it a moment ago
                    os.kill(one["pid"], signal.SIGKILL)
        return halted | self._read("stopped")  # read last, for the same reason

    def _missing(self, is_missing: Callable[[State], bool]) -> dict[int, State]:
        """Of the ranks that have neither left nor ended nor wait for others themselves, those of whom `is_missing` says so."""
        excused = self._ranks("left") | self._ranks("ended") | self._ranks("waits")
        return {rank: one for rank, one in self._read("beat").items() if rank not in excused and is_missing(one)}

    def _read(self, kind: str) -> dict[int, State]:
        ranks = sorted(self._ranks(kind))
        found = self.store.multi_get([f"{kind}/{rank}" for rank in ranks]) if ranks else []
        return {rank: json.loads(said) for rank, said in zip(ranks, found, strict=True)}

    def _ranks(self, kind: str) -> set[int]:
        """Those of the others that have put one up."""
        return set(map(int, self.store.get(kind).split())) - {self.rank} if self.store.check([kind]) else set()


def named(failed: Failed) -> str:
    """In words; empty if nobody is to blame."""
    return "; ".join(f"rank {rank} ({one['host']}, pid {one['pid']}) {_cause(one)}" for rank, one in failed.items())


def _cause(one: State) -> str:
    if "cause" in one:
        return f"failed {one['doing']}: {one['cause']}"
    state = process.state(one)
    if "how" in one:
        how = one["how"]
    elif state in process.ENDED:
        how = "has died"
    elif state in process.STOPPED:
        how = "has stalled"
    else:
        how = "has died or stalled" if state == process.UNKNOWN else "has not come"
    return f"{how}; its last heartbeat was {one['doing']}"
