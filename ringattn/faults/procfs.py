"""Reads from /proc whether a process of this host runs, has ended, or has been stopped.

A process is identified by host, PID namespace, number and start time, since numbers are reused. Nothing is known about
processes of other hosts, or where there is no /proc.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDED, STOPPED, UNKNOWN = ("X", "Z"), ("T",), ""  # states, as Linux abbreviates them
START_TIME = 19  # index of the start time in /proc/PID/stat, counted from the state


def own() -> dict[str, Any]:
    """The identity of this process."""
    return {
        "host": socket.gethostname(),
        "within": _pid_namespace(),
        "pid": os.getpid(),
        "born": _stat("self")[START_TIME:][:1],
    }


def state(identity: Mapping[str, Any]) -> str:
    """The letter that Linux has for the state of a process, X if it is gone; a recorded state takes precedence."""
    if "state" in identity:
        return str(identity["state"])
    if identity["host"] != socket.gethostname() or identity["within"] != _pid_namespace() or not identity["born"]:
        return UNKNOWN
    fields = _stat(identity["pid"])
    return fields[0] if fields[START_TIME:][:1] == identity["born"] else "X"


def _pid_namespace() -> str:
    """The PID namespace: containers may share a host name, but not this."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the state on, empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
