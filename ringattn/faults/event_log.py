"""Writes what one rank did to a file of JSON lines, for later questions such as which rank was late, and where.

    {"time": 1764028800.1, "event": "pass", "name": "forward (token_ring)", "seconds": 0.081, "waited": 0.012,
     "longest": "Q2 from rank 2 to rank 1, departing in step 0, due in step 3", "longest_seconds": 0.009, "bytes_sent": 524288}

A pass on a GPU has no waits, as the host runs ahead: its line has "seconds" from its first transfer to its end on the GPU,
written once it has ended, and "host_seconds" until all of it was issued; a pass captured in a CUDA graph has "captured": true.

There is no event log unless `init(journal=)` requests one. Each line is complete as soon as it is written: a process that is
killed loses none. If a line cannot be written, a warning is printed and the rest of the event log is dropped; the job goes on.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ringattn._validation import short_repr

_event_logs: WeakKeyDictionary[dist.ProcessGroup, EventLog] = WeakKeyDictionary()  # of the default group; ends with it


class EventLog:
    """The file `rank00003.jsonl` in `directory`, to which restarts of the rank append."""

    def __init__(self, directory: str | Path, rank: int) -> None:
        self.path = Path(directory) / f"rank{rank:05d}.jsonl"
        self._file: TextIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1)
        except OSError as error:
            self._disable(error)

    def write(self, event: str, fields: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(_line({"time": time.time(), "event": event, **fields}) + "\n")
            except OSError as error:
                self._disable(error)

    def _disable(self, error: OSError) -> None:
        self._file = None
        print(f"warning: {self.path} is no longer written: {error}", file=sys.stderr, flush=True)


def _line(fields: dict[str, Any]) -> str:
    try:
        return json.dumps(fields, default=short_repr)
    except (TypeError, ValueError, RecursionError):  # keys that are not text, values that contain themselves
        return json.dumps({name: short_repr(value) for name, value in fields.items()})


def begin(directory: str | Path, **fields: Any) -> None:
    """Start this rank's event log, until the default group ends. Its first line holds `fields`."""
    world = dist.group.WORLD
    assert world is not None
    _event_logs[world] = EventLog(directory, dist.get_rank())
    note("begin", **fields)


def is_logging() -> bool:
    """Whether this rank writes an event log."""
    return dist.is_initialized() and dist.group.WORLD in _event_logs


def note(event: str, **fields: Any) -> None:
    """Write a line to this rank's event log, if it has one. fields: JSON values; others are written as text."""
    if dist.is_initialized() and dist.group.WORLD is not None and (event_log := _event_logs.get(dist.group.WORLD)):
        event_log.write(event, fields)
