"""Starts real ranks as processes of this host, without torchrun, and runs one function in each.

    python ranks.py MODULE:FUNCTION RESULT.json     in each rank, with torchrun's variables in the environment

The function returns what JSON can hold. All that is started is ended, by `run_ranks` itself or with the stage's process group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from stage import first_line, write_json


class Ended(NamedTuple):
    """What became of one rank."""

    result: Any  # what its function returned
    error: str  # in words; empty if all went well
    seconds: float
    output: str  # what it printed
    at: float  # when it had ended, as time.time()


def run_ranks(world: int, job: str, seconds: float, **environment: str) -> list[Ended]:
    """Run `job` ("module:function") in `world` processes; those that have not ended after `seconds` are killed."""
    host = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    shared = {**os.environ, "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"} | host | environment
    begin, processes, outputs = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(world)]
        try:
            for rank, path in enumerate(results):
                command = [sys.executable, str(Path(__file__).resolve()), job, str(path)]
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                outputs.append(path.with_suffix(".txt"))
                with outputs[-1].open("w") as file:
                    processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
            return [ended(process, path, begin, seconds) for process, path in zip(processes, results, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for rank, output in enumerate(outputs):
                print(f"--- {job}, rank {rank}\n{output.read_text(errors='replace')}", flush=True)


def ended(process: subprocess.Popen[bytes], path: Path, begin: float, seconds: float) -> Ended:
    """Wait for one rank, until `seconds` after `begin`."""
    error = ""
    try:
        code = process.wait(max(0.1, begin + seconds - time.monotonic()))
        error = f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"had not ended after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(6)  # prints the stacks of its threads
            time.sleep(0.3)
    outcomes = json.loads(path.read_text()) if path.exists() else {}
    output = path.with_suffix(".txt").read_text(errors="replace")
    seconds = outcomes.get("seconds", time.monotonic() - begin)
    return Ended(outcomes.get("result"), outcomes.get("error") or error, seconds, output, time.time())


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def main() -> int:
    faulthandler.enable()
    job, path = sys.argv[1], Path(sys.argv[2])
    module, _, function = job.partition(":")
    begin = time.monotonic()
    try:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        result = getattr(importlib.import_module(module), function)()
        write_json(path, {"result": result, "seconds": time.monotonic() - begin})
    except BaseException as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {first_line(error)}"
        write_json(path, {"error": words, "seconds": time.monotonic() - begin})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
