"""`ringattn report`: packs into one file what to send with a bug report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ringattn._validation import path
from ringattn.cli.doctor import examined, prints_here
from ringattn.cli.requirements import require
from ringattn.cli.terminal import console
from ringattn.errors import InputError, LaunchError


def report(paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), *, out: Path = Path("ringattn-report.zip")) -> None:
    """Pack what to send with a bug report into one file; under torchrun, started as the job was, rank 0 does it.

    It holds what doctor finds, the environment variables that backends and launchers read (none whose name suggests a secret),
    packages and their versions, limits, and the ends of logs. Nothing is sent: look at it before you send it.

    Args:
        paths: Logs, or folders that hold some: a run's --out, its --journal, what the scheduler wrote.
        out: The file to write.
    """
    require("torch")
    from ringattn.diagnostics import Finding, write

    try:
        findings = examined()
    except LaunchError as error:  # which may be what the report is about
        findings = [Finding("doctor", "fails", str(error))]
    if prints_here():
        names = write(path("--out", out, InputError), findings, paths)
        console().print(f"{out}: {', '.join(names)}", highlight=False)
