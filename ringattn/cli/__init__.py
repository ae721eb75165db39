"""The console script `ringattn`, also `python -m ringattn`: compares plans, trains, examines machines and their links.

    ringattn plan 65536 --world 8 --heads 32 --kv-heads 8 --head-dim 128 --dtype bfloat16 --topology nvswitch --draw plan.svg
    torchrun --nproc-per-node 4 -m ringattn train
    ringattn doctor
    torchrun --nproc-per-node 8 -m ringattn doctor
    torchrun --nproc-per-node 8 -m ringattn probe --out links.json
    ringattn selftest
    ringattn report runs/train --out report.zip

Errors that ringattn raises on purpose are one paragraph on stderr and exit status 2; a training run that fails ends with 1.
The command line needs tyro and rich (`pip install 'ringattn[cli]'`), which nothing else in ringattn imports.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ringattn.cli.requirements import require
from ringattn.errors import RingAttnError

__all__ = ["COMMANDS", "main", "require"]

# Each command is a function of this name in the module given; its docstring and annotations are its help and its flags.
COMMANDS = {
    "plan": "plan",
    "train": "train.command",
    "doctor": "doctor",
    "probe": "probe",
    "selftest": "selftest",
    "report": "report",
}
DESCRIPTION = "Exact attention over sequences that are cut over ranks: compare plans, train, examine machines and their links."


def main() -> None:
    """Entry point of the console script."""
    try:
        require("tyro", "rich")
        import tyro

        functions = {name: getattr(import_module(f"ringattn.cli.{module}"), name) for name, module in COMMANDS.items()}
        try:
            tyro.extras.subcommand_cli_from_dict(functions, prog="ringattn", description=DESCRIPTION)
        finally:
            sys.stdout.flush()
    except RingAttnError as error:
        print(f"ringattn: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, as `head`, has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail too
        sys.exit(1)
