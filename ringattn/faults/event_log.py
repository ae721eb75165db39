"""What one rank did, as JSON lines in a file of its own: for whoever wants to know afterwards who was late, and where.

    {"time": 1764028800.1, "event": "pass", "name": "forward (token_ring)", "seconds": 0.081, "waited": 0.012,
     "longest": "Q2 from rank 2 to rank 1, departing in step 0, due in step 3", "longest_seconds": 0.009, "bytes_sent": 524288}

A pass on a GPU has no waits, as its host is ahead: its line has "seconds" from its first transfer to its end on the GPU,
written once it has ended, and "host_seconds" until all of it was issued; one that a CUDA graph has captured has
"captured": true.

There is none unless it was asked for, with `init(journal=)`. Lines are whole as soon as they are written: a process that is
killed loses none. One that cannot be written costs a warning and the rest of the journal, not the job.
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

_journals: WeakKeyDictionary[dist.ProcessGroup, EventLog] = WeakKeyDictionary()  # of the default group; ends with it


class EventLog:
    """The file `rank00003.jsonl` in `directory`, to which restarts of the rank append."""

    def __init__(self, directory: str | Path, rank: int) -> None:
        self.path = Path(directory) / f"rank{rank:05d}.jsonl"
        self._file: TextIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1)
        except OSError as error:
            self._without(error)

    def write(self, event: str, said: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(_line({"time": time.time(), "event": event, **said}) + "\n")
            except OSError as error:
                self._without(error)

    def _without(self, error: OSError) -> None:
        self._file = None
        print(f"warning: {self.path} is no longer written: {error}", file=sys.stderr, flush=True)


def _line(said: dict[str, Any]) -> str:
    try:
        return json.dumps(said, default=short_repr)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, values that hold themselves
        return json.dumps({name: short_repr(value) for name, value in said.items()})


def begin(directory: str | Path, **said: Any) -> None:
    """From now on this rank keeps a journal, until the default group ends. Its first line has what is `said`."""
    world = dist.group.WORLD
    assert world is not None
    _journals[world] = EventLog(directory, dist.get_rank())
    note("begin", **said)


def is_logging() -> bool:
    """Whether this rank keeps a journal."""
    return dist.is_initialized() and dist.group.WORLD in _journals


def note(event: str, **said: Any) -> None:
    """A line in this rank's journal, if it keeps one. said: JSON values; others are written as text."""
    if dist.is_initialized() and dist.group.WORLD is not None and (journal := _journals.get(dist.group.WORLD)):
        journal.write(event, said)
