"""Prints to the terminal at its width, or at a fixed one where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 160  # columns where there is no terminal to ask


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE)
