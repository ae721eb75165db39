"""Whose fault it is that a transfer has failed: read from the notices that ranks have put in the rendezvous store.

    beat/3      what rank 3 is, does, and how often it has said so      stopped/3   another found its process stopped
    failed/3    the exception that ends it                              waits/3     it misses others itself
    left/3      it left in good order                                   told/3      it has read all it needs
    failure     somebody has failed

First come exceptions, then processes of this host that have ended or been stopped; then silence, for which counts of beats are
compared, not times, so that clocks need not agree; and last whoever is alive but elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

from ringattn.comm import process

BEAT = 0.4  # seconds
SILENT = 3 * BEAT  # without a new beat a rank is dead, or stopped
IDLE = "outside of transfers"

State = dict[str, Any]
Failed = Mapping[int, State]  # by rank


@dataclass(frozen=True)
class Notices:
    """What ranks have put up, as one of them reads it. All that it does raises `RuntimeError` when the store is gone."""

    store: Store
    rank: int
    world: int

    def put(self, kind: str, said: State | None = None) -> None:
        self.store.set(f"{kind}/{self.rank}", json.dumps(said or {}))

    def failure(self) -> bool:
        return bool(self.store.check(["failure"]))

    def find(self) -> Failed:
        """The ranks that have failed; takes up to 2 x `SILENT` seconds."""
        self.put("waits")
        before, until = self._read("beat"), time.monotonic() + SILENT
        while not (failed := self.known()) and time.monotonic() < until:
            time.sleep(BEAT / 5)
        failed = failed or self._missing(lambda one: one in before.values()) or self._missing(lambda one: one["doing"] == IDLE)
        self.heard(failed)
        return failed

    def known(self) -> Failed:
        """Those that have said so themselves, or of which a host can tell."""
        return self._read("failed") or self._halted()

    def heard(self, failed: Iterable[int]) -> None:
        """This rank has read what it needs. Rank 0 may host the store that the others still have to read: it waits for them."""
        self.store.set("failure", "1")
        self.put("told")
        if self.rank == 0:
            others, until = {*range(1, self.world)} - {*failed}, time.monotonic() + SILENT
            while others - {*self._keys("told")} - {*self._keys("left")} and time.monotonic() < until:
                time.sleep(BEAT / 5)

    def _halted(self) -> Failed:
        """Ranks of this host whose process has ended or been stopped, and what others have found so. Who is stopped is noted
        for the others and then killed: the job is lost, and a stopped process keeps its memory and its ports."""
        states = {rank: one | {"state": process.state(one)} for rank, one in self._missing(lambda one: True).items()}
        halted = {rank: one for rank, one in states.items() if one["state"] in (*process.ENDED, *process.STOPPED)}
        for rank, one in halted.items():
            if one["state"] in process.STOPPED:
                self.store.set(f"stopped/{rank}", json.dumps(one))
                os.kill(one["pid"], signal.SIGKILL)
        return halted | self._read("stopped")  # read last: another rank may have killed it a moment ago

    def _missing(self, is_missing: Callable[[State], bool]) -> dict[int, State]:
        """Of the ranks that neither have left nor wait for others themselves, those of whom `is_missing` says so."""
        excused = {*self._keys("left"), *self._keys("waits")}
        return {rank: one for rank, one in self._read("beat").items() if is_missing(one) and rank not in excused}

    def _read(self, kind: str) -> dict[int, State]:
        return {rank: json.loads(self.store.get(key)) for rank, key in self._keys(kind).items()}

    def _keys(self, kind: str) -> dict[int, str]:
        """Those that other ranks have put up."""
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world) if rank != self.rank}
        return {rank: key for rank, key in keys.items() if self.store.check([key])}


def named(failed: Failed) -> str:
    """In words; empty if nobody is to blame."""
    return "; ".join(f"rank {rank} ({one['host']}, pid {one['pid']}) {_cause(one)}" for rank, one in failed.items())


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
