"""Many command lines in one process, each to its end: `fuzz_job.py train|ringattn FILE`, cases as JSON, one answer a line.

A train case runs the whole job, one step long. An answer is "end", "exit CODE", "raised TYPE: TEXT", or a traceback.
"""

import contextlib
import faulthandler
import io
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

LIMIT = 50  # seconds for all of them


def train(arguments: list[str]) -> None:
    import tyro

    from ringattn.cli.train import TrainConfig, train

    train(tyro.cli(TrainConfig, args=arguments))


def command(arguments: list[str]) -> None:
    from ringattn import cli

    with mock.patch.object(sys, "argv", ["ringattn", *arguments]):
        cli.main()


def answer(which: str, arguments: list[str]) -> tuple[str, str]:
    """How it ended, and what it wrote to stderr."""
    from ringattn import RingAttnError

    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            {"train": train, "ringattn": command}[which](arguments)
        except SystemExit as left:
            return f"exit {left.code}", err.getvalue()
        except RingAttnError as error:
            return f"raised {type(error).__name__}: {error}", err.getvalue()
        except BaseException:
            return traceback.format_exc(), err.getvalue()
    return "end", err.getvalue()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    cases = json.loads(Path(sys.argv[2]).read_text())
    os.chdir(Path(sys.argv[2]).parent)  # a path that is drawn may be a relative one
    for case in cases:
        print(json.dumps([case, *answer(sys.argv[1], case)]), flush=True)
