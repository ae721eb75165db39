"""Where the command writes: as wide as the terminal, or wide where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 160  # columns where there is no terminal to ask


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE)
