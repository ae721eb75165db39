"""What one rank reads from the store about ranks that have failed, while the store may end with the rank that hosts it."""

import threading
import time
from typing import Any

import torch.distributed as dist
from spawn import run_ranks

from ringattn.faults.diagnosis import GRACE, HealthStore
from ringattn.faults.watchdog import BEAT, Watchdog


class EndsAtTheAcknowledgement:
    """A store whose host ends as soon as it has read that this rank is informed: the reply never arrives."""

    def __init__(self) -> None:
        self._store = dist.HashStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, key: str, value: str) -> None:
        self._store.append(key, value)
        if key == "informed":
            raise RuntimeError("recvValue failed")


def explained(rank: int) -> str:
    store = EndsAtTheAcknowledgement()
    watchdog = Watchdog(HealthStore(store, 2, 3))
    watchdog.begin()
    other = HealthStore(store, 1, 3)
    other.put("beat", {"host": "b", "pid": 7, "within": "", "born": "", "doing": "in backward"})
    other.fail({"host": "b", "pid": 7, "doing": "in backward", "cause": "MemoryError: no room for k"})
    return watchdog.explain()


def test_what_was_read_is_known_though_the_store_ends_right_after_it() -> None:
    (text,) = run_ranks(1, explained, isolated=True)
    assert "rank 1 (b, pid 7)" in text and "no room for k" in text


def test_the_host_of_the_store_waits_for_a_rank_that_only_waits_for_it() -> None:
    """Such a rank learns of the failure with a heartbeat, and gives up waiting at the heartbeat after `GRACE`."""
    store = dist.HashStore()
    late = GRACE + 1.5 * BEAT
    other = threading.Timer(late, lambda: HealthStore(store, 2, 3).put("informed"))
    other.start()
    since = time.monotonic()
    HealthStore(store, 0, 3).acknowledge({1: {}})
    assert time.monotonic() - since >= late
    other.join()
