"""Runs Python commands in forked processes that have torch imported already, alone or as the ranks of one job.

A new interpreter takes seconds of a core to import torch, and transformers as many again; a process of the fork server has
both. What the command sees is what it would see of its own: `__main__`, `sys.argv`, `sys.path`, the environment, stdout,
stderr and exit handlers. As ranks it gets the variables and the store that torchrun's agent provides. Where the interpreter
itself, its import order or torchrun is what is tested, a test asks for a new one: `start(..., fresh=True)`.
"""

import ast
import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import io
import multiprocessing.process
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

TESTS = str(Path(__file__).parents[1])
GRACE = 10.0  # seconds that ranks get to end after SIGTERM, when one of them has failed


class Command:
    """A command that runs, with what `subprocess.Popen` has: pid, poll, wait, communicate, send_signal, kill, returncode.

    command: what follows `python` on a command line: SCRIPT, -c CODE or -m MODULE, and arguments.
    environment: all variables of the process. ranks: how many processes share it as one job, None for one that is no rank.
    """

    def __init__(self, context: Any, command: list[str], environment: dict[str, str], ranks: int | None = None) -> None:
        self.args = command
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._output:
            path.touch()
        search = [path for path in sys.path if path and not path.startswith(TESTS)]
        given = (list(map(str, self._output)), list(command), dict(environment), search, ranks)
        self._process = context.Process(target=_run, args=given, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(output: list[str], command: list[str], environment: dict[str, str], search: list[str], ranks: int | None) -> NoReturn:
    """All that the forked process does."""
    try:
        _as_new(output, environment)
        sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *search]
        code = _agent(command, ranks) if ranks else _main(command)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _as_new(output: list[str], environment: dict[str, str]) -> None:
    """Streams, environment and settings as a new interpreter has them."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, path in enumerate(output, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), write_through=False)  # noqa: SIM115  (open as long as the process)
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), errors="backslashreplace", line_buffering=True)  # noqa: SIM115  (open as long as the process)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable(sys.stderr)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    random.seed()
    current: Any = multiprocessing.process.current_process()
    current.name = "MainProcess"
    current._config.pop("daemon", None)  # it may have children
    multiprocessing.set_start_method(None, force=True)


def _main(command: list[str]) -> int:
    """Runs the command as `__main__` and everything that runs when an interpreter ends; the exit code."""
    code = 0
    try:
        _execute(*command)
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _exit_code(given: object) -> int:
    if given is None:
        return 0
    if isinstance(given, int):
        return given & 0xFF
    print(given, file=sys.stderr)
    return 1


def _execute(what: str, *rest: str) -> None:
    if what == "-m":
        name, *arguments = rest
        sys.argv = [name, *arguments]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    code, arguments = (rest[0], rest[1:]) if what == "-c" else (Path(what).read_text(), rest)
    sys.argv = ["-c" if what == "-c" else what, *arguments]
    sys.path.insert(0, "" if what == "-c" else str(Path(what).resolve().parent))
    main = ModuleType("__main__")
    if what != "-c":
        main.__file__ = what
    sys.modules["__main__"] = main
    exec(compile(code, "<string>" if what == "-c" else what, "exec"), main.__dict__)


def _agent(command: list[str], ranks: int) -> int:
    """Starts the ranks as torchrun's agent does, and ends them all when one has failed; the exit code."""
    _import_ahead(command)
    gc.collect()
    gc.freeze()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1])}
        children: dict[int, int] = {}
        signal.signal(signal.SIGTERM, lambda *_: [_kill(child, signal.SIGTERM) for child in children])
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _rank(command, rank, ranks, address, listening)
            children[pid] = rank
        # Only now: it starts threads, which a fork would not copy.
        port, timeout = listening.getsockname()[1], timedelta(seconds=60)
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listening.detach()
        )
        failed = _wait_for_all(children)
        del store
    return int(bool(failed))


def _rank(command: list[str], rank: int, ranks: int, address: dict[str, str], listening: socket.socket) -> NoReturn:
    """One rank, with the variables that torchrun sets."""
    code = 1
    try:
        listening.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        of_rank = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
        of_all = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(ranks))
        os.environ.update({**of_rank, **of_all, **address, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"})
        os.environ.update(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_RUN_ID="none")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCH_NCCL_ASYNC_ERROR_HANDLING="1")
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
        random.seed()
        code = _main(command)
    finally:
        os._exit(code)


def _wait_for_all(children: dict[int, int]) -> dict[int, int]:
    """Waits for every rank; the exit codes, by rank, of those that failed. `children` are the ranks by process id."""
    failed: dict[int, int] = {}

    def kill_all(*_: object) -> None:
        for child in children:
            _kill(child, signal.SIGKILL)

    while children:
        pid, status = os.wait()
        if pid not in children:
            continue
        rank, code = children.pop(pid), os.waitstatus_to_exitcode(status)
        if code and not failed:
            signal.signal(signal.SIGALRM, kill_all)
            signal.setitimer(signal.ITIMER_REAL, GRACE)
            for child in children:
                _kill(child, signal.SIGTERM)
        if code:
            failed[rank] = code
            print(f"rank {rank} (pid {pid}) ended with exit code {code}", file=sys.stderr)
    return failed


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _import_ahead(command: list[str]) -> None:
    """Imports, once for all ranks, what the script imports at its top; errors are left for the ranks to meet."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd() if command[0].startswith("-") else str(Path(command[0]).resolve().parent))
    with contextlib.suppress(Exception):
        tree = ast.parse(_source(command))
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    sys.path[:] = before


def _source(command: list[str]) -> str:
    kind, *rest = command
    if kind == "-c":
        return rest[0]
    if kind == "-m":
        actual = importlib.util.find_spec(rest[0])
        return Path(actual.origin).read_text() if actual and actual.origin else ""
    return Path(kind).read_text()
