"""Tracks transfers that the host has posted and the GPU has not finished yet.

Waiting for an NCCL transfer returns at once and only makes the GPU's stream wait, so the host is far ahead when a peer fails.
What this rank really waits for is the oldest transfer whose work is not complete. The watchdog's watching thread polls for it a
few times a second; the training thread polls nothing.

Polling means querying a CUDA event. By default CUDA refuses that, and breaks the capture, while any thread captures a graph, so
the watching thread first takes the capture mode in which captures of other threads do not concern it
(cudaThreadExchangeStreamCaptureMode, CUDA runtime API, stream management). Where it cannot, nothing is tracked.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringattn.comm.process_group import capturing, timeout_of

EARLY = 5.0  # seconds before the backend's own deadline, at which it would end the process without naming a rank
MOST = 1 << 14  # transfers posted and not polled; more only if the watching thread has ended
THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Posted(NamedTuple):
    """One transfer or batch: its description for other ranks, its handles, and when it was posted (monotonic seconds)."""

    doing: tuple[Any, ...]
    works: Sequence[Any]  # each with `is_completed`
    group: dist.ProcessGroup | None
    device: torch.device
    since: float
    finished: Callable[[], None] | None  # called once it is complete

    @property
    def deadline(self) -> float:
        """When to give up. The timeout is read at each call, as training loops shorten it after the first steps."""
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        timeout = timeout_of(group, self.device)
        return self.since + max(timeout / 2, timeout - EARLY)


class StreamEvent(NamedTuple):
    """An event of a stream, with the interface of a transfer's handle."""

    event: Any

    def is_completed(self) -> bool:
        return bool(self.event.query())


def record_event(device: torch.device, *, timed: bool = False) -> Any:
    """An event recorded on the device's current stream, with its time if it is `timed`."""
    module = getattr(torch, device.type)
    event = module.Event(enable_timing=timed)
    event.record(module.current_stream(device))
    return event


class PendingTransfers:
    """The transfers posted so far, oldest first."""

    def __init__(self) -> None:
        self._posted: deque[Posted] = deque(maxlen=MOST)
        self._paused = False
        self._first: Posted | None = None  # the oldest at the last poll; `_oldest_since` is since when
        self._oldest_since = 0.0
        self._may_query: bool | None = None  # unknown until the watching thread has tried

    def add(
        self,
        doing: tuple[Any, ...],
        works: Sequence[Any],
        group: dist.ProcessGroup | None,
        device: torch.device,
        finished: Callable[[], None] | None = None,
    ) -> None:
        """Called by the posting thread. Transfers captured in a CUDA graph do not run now and cannot be queried."""
        self._paused = capturing(device)
        if not self._paused and self._may_query is not False:
            self._posted.append(Posted(doing, works, group, device, time.monotonic(), finished))

    def oldest(self) -> Posted | None:
        """The first incomplete transfer, after dropping those before it; None during a capture. For one thread only."""
        before, self._first = self._first, self._next()
        if self._first is not before:
            self._oldest_since = time.monotonic()
        return self._first

    def clear(self) -> None:
        """Drop all transfers and stop tracking: entries would keep their group alive."""
        self._may_query = False
        self._posted.clear()

    def seconds(self) -> float:
        """For how long `oldest` has returned the same transfer; 0 if there is none."""
        return time.monotonic() - self._oldest_since if self._first is not None else 0.0

    def _next(self) -> Posted | None:
        while self._posted and not self._paused:
            first = self._posted[0]
            if self._may_query is None:
                self._may_query = _queries_are_safe(first.device)
            if not self._may_query:
                self._posted.clear()
                return None
            if not all(map(_is_complete, first.works)):
                return first
            self._posted.popleft()
            if first.finished is not None:
                with contextlib.suppress(RuntimeError):  # of the device
                    first.finished()
        return None


def _is_complete(work: Any) -> bool:
    try:
        return bool(work.is_completed())
    except RuntimeError:  # of the device; the training thread will get it too
        return False


def _queries_are_safe(device: torch.device) -> bool:
    """Make queries of this thread harmless to captures in other threads; returns whether that worked."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.set_device(device)  # of this thread, which would else use memory of the first GPU
        runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
        mode = ctypes.c_int(THREAD_LOCAL)
        return int(runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))) == 0
    except (OSError, AttributeError, RuntimeError):
        return False
