"""What Linux tells of a process of this host: whether it lives, has ended, or has been stopped.

A process is known by host, container, number and time of birth, since numbers are given to others in time. Of others nothing is
told, and nothing where there is no /proc.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDED, STOPPED, UNKNOWN = ("X", "Z"), ("T",), ""  # states, as Linux abbreviates them
BORN = 19  # where /proc/PID/stat has the time of birth, counted from the state


def own() -> dict[str, Any]:
    """This process."""
    return {"host": socket.gethostname(), "within": _within(), "pid": os.getpid(), "born": _stat("self")[BORN:][:1]}


def state(one: Mapping[str, Any]) -> str:
    """The letter that Linux has for the state of a process, X if it is gone; where one has been noted, that."""
    if "state" in one:
        return str(one["state"])
    if one["host"] != socket.gethostname() or one["within"] != _within() or not one["born"]:
        return UNKNOWN
    found = _stat(one["pid"])
    return found[0] if found[BORN:][:1] == one["born"] else "X"


def _within() -> str:
    """What numbers of processes are counted in: containers may share a host's name, but not these."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int | str) -> list[str]:
    """What /proc tells of a process from its state on, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
