"""Processes outside of any job: a clean environment, a free port, and whether this machine allows network namespaces."""

import contextlib
import os
import random
import shutil
import socket
import subprocess

from spawn import finish, start

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER", "RANK", "WORLD", "LOCAL"))}


def free_port() -> int:
    """Below the range from which the kernel gives ports to connections: nobody takes it before the test does."""
    while True:
        port = random.SystemRandom().randint(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def run_alone(
    env: dict[str, object], code: str = "import ringattn; print(ringattn.init(timeout=4))"
) -> subprocess.CompletedProcess[str]:
    command = ["-c", code]
    ended, out, err = finish(start(command, **{name: str(value) for name, value in env.items()}), timeout=120)
    return subprocess.CompletedProcess(command, ended, out, err)


def environment(**changes: object) -> dict[str, object]:
    return dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) | changes


def namespaces_allowed() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        return False
    name = f"ringattn-{os.getpid()}"
    result = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return result and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0
