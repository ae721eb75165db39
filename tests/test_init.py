"""`init`: what a wrong environment, a missing rank and a damaged one get to hear."""

import os
import socket
import subprocess
import sys
import time

import pytest

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER", "RANK", "WORLD", "LOCAL"))}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    env: dict[str, object], code: str = "import ringattn; print(ringattn.init(timeout=4))"
) -> subprocess.CompletedProcess[str]:
    text = {name: str(value) for name, value in env.items()}
    return subprocess.run([sys.executable, "-c", code], env=CLEAN | text, capture_output=True, text=True, timeout=40)


def environment(**changes: object) -> dict[str, object]:
    return dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) | changes


def test_a_single_rank_starts_without_torchrun() -> None:
    assert "DeviceMesh" in run(environment()).stdout


@pytest.mark.case(18)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(RANK="two"), "torchrun's environment is damaged"),
        (dict(LOCAL_WORLD_SIZE="all"), "torchrun's environment is damaged"),
        (dict(RANK=3, WORLD_SIZE=2), "RANK=3 does not lie in WORLD_SIZE=2"),
    ],
)
def test_a_damaged_environment_is_named(changes: dict[str, object], text: str) -> None:
    assert text in run(environment(**changes)).stderr


@pytest.mark.case(19)
def test_a_rank_that_never_comes_is_named_in_time() -> None:
    begin = time.monotonic()
    ran = run(environment(WORLD_SIZE=3))
    assert "LaunchError: ranks 1, 2 of 3 did not come within 4 s, says rank 0" in ran.stderr
    assert time.monotonic() - begin < 25


@pytest.mark.case(18)
def test_a_port_that_is_taken_and_an_interface_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ran = run(environment(WORLD_SIZE=2, MASTER_PORT=taken.getsockname()[1]))
    assert "LaunchError: rank 0 of 2 could not use the store at" in ran.stderr and "the port is taken" in ran.stderr
    ran = run(environment(GLOO_SOCKET_IFNAME="warp9"))
    assert "LaunchError: GLOO_SOCKET_IFNAME=warp9: this host" in ran.stderr and "name one of these" in ran.stderr
