"""The console script `ringattn`: `plan` compares plans on paper, `doctor` looks at this machine, `selftest` tries every kernel
on it, `probe` measures its links, `report` packs what to send with a bug report.

    ringattn plan 65536 --world 8 --heads 32 --kv-heads 8 --head-dim 128 --dtype bfloat16 --topology nvswitch --draw plan.svg
    ringattn doctor
    ringattn selftest
    torchrun --nproc-per-node 8 -m ringattn doctor
    torchrun --nproc-per-node 8 -m ringattn probe --out links.json
    ringattn report runs/train --out report.zip

Errors that ringattn raises on purpose are one paragraph on stderr and exit status 2.
"""

from __future__ import annotations

import sys
from typing import Any

import tyro

from ringattn.cli.machine import doctor, probe, report, selftest
from ringattn.cli.planning import plan
from ringattn.errors import RingAttnError


def main() -> None:
    """Entry point of the console script."""
    commands: dict[str, Any] = {"plan": plan, "doctor": doctor, "selftest": selftest, "probe": probe, "report": report}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="ringattn")
    except RingAttnError as error:
        print(f"ringattn: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
