"""`init`: what a wrong environment, a missing rank and a damaged one get to hear."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time

import pytest
from hostile import VALUES, survives
from processes import CLEAN, environment, namespaces_allowed, run_alone

import ringattn


def test_a_single_rank_starts_without_torchrun() -> None:
    assert "DeviceMesh" in run_alone(environment()).stdout


@pytest.mark.case(18)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(RANK="two"), "torchrun's environment is damaged"),
        (dict(LOCAL_WORLD_SIZE="all"), "torchrun's environment is damaged"),
        (dict(RANK=3, WORLD_SIZE=2), "RANK=3 does not lie in WORLD_SIZE=2"),
        (dict(MASTER_PORT=-1), "MASTER_PORT=-1; must be 1 or more"),
        (dict(MASTER_PORT=99999), "MASTER_PORT=99999; must be 65,535 or less"),
        (dict(WORLD_SIZE="9" * 30), "WORLD_SIZE=999999999999999999999999999999; must be 1,048,576 or less"),
        (dict(WORLD_SIZE="9" * 5000), "torchrun's environment is damaged"),
        (dict(WORLD_SIZE=2, RANK=1, MASTER_ADDR="no.such.host.invalid"), "could not use the store at no.such.host.invalid"),
    ],
)
def test_a_damaged_environment_is_named(changes: dict[str, object], text: str) -> None:
    assert text in run_alone(environment(**changes)).stderr


@pytest.mark.parametrize("argument", ["backend", "timeout", "journal", "high_priority_stream", "max_ctas"])
def test_arguments_that_cannot_be_are_named(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that can be come as far as to miss torchrun's environment."""
    for name in environment():
        monkeypatch.delenv(name, raising=False)
    message = {label: survives(lambda given={argument: value}: ringattn.init(**given)) for label, value in VALUES.items()}
    assert all(text and (argument in text or "was not started by torchrun" in text) for text in message.values()), message
    assert sum("torchrun" not in (text or "") for text in message.values()) > len(VALUES) / 2


@pytest.mark.case(19)
def test_a_rank_that_never_comes_is_named_in_time() -> None:
    begin = time.monotonic()
    ran = run_alone(environment(WORLD_SIZE=3))
    assert "LaunchError: ranks 1, 2 of 3 did not start within 4 s, reports rank 0" in ran.stderr
    assert time.monotonic() - begin < 25


@pytest.mark.case(18)
def test_a_port_that_is_taken_and_an_interface_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ran = run_alone(environment(WORLD_SIZE=2, MASTER_PORT=taken.getsockname()[1]))
    assert "LaunchError: rank 0 of 2 could not use the store at" in ran.stderr and "the port is taken" in ran.stderr
    ran = run_alone(environment(GLOO_SOCKET_IFNAME="warp9"))
    assert "LaunchError: GLOO_SOCKET_IFNAME=warp9: this host" in ran.stderr and "name one of these" in ran.stderr


@pytest.mark.slow
@pytest.mark.case(18)
@pytest.mark.skipif(not namespaces_allowed(), reason="needs root and iproute2, and namespaces allowed")
def test_hosts_that_cannot_reach_each_other_are_named_on_every_rank() -> None:
    """Two hosts, joined by a cable. Each tells the other an address that only it can use: both name the pair, in seconds. With
    one of them right the job starts, since gloo needs one direction."""
    code = "import time, torch, ringattn; begin = time.monotonic()\n"
    code += "try: print(ringattn.init(timeout=30))\nfinally: print('seconds', time.monotonic() - begin, flush=True)"
    hosts = [f"ringattn-{os.getpid()}-{n}" for n in range(2)]
    cables = [f"rc{os.getpid() % 10**6}-{n}" for n in range(2)]
    commands = [f"netns add {host}" for host in hosts]
    commands += [f"link add {cables[0]} netns {hosts[0]} type veth peer name {cables[1]} netns {hosts[1]}"]
    for n, (host, cable) in enumerate(zip(hosts, cables, strict=True)):
        rest = (f"addr add 10.9.8.{n + 1}/24 dev {cable}", f"link set {cable} up", "link set lo up")
        commands += [f"-n {host} {command}" for command in rest]
    try:
        for command in commands:
            subprocess.run(["ip", *shlex.split(command)], check=True)
        for interfaces, reached in ((("lo", "lo"), False), (("lo", cables[1]), True)):
            place = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, MASTER_ADDR="10.9.8.1")
            given = [environment(RANK=n, GLOO_SOCKET_IFNAME=interfaces[n], **place) | dict(MASTER_PORT=29511) for n in range(2)]
            ranks = [
                subprocess.Popen(
                    ["ip", "netns", "exec", host, sys.executable, "-c", code],
                    env=CLEAN | {name: str(value) for name, value in variables.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for host, variables in zip(hosts, given, strict=True)
            ]
            message = [rank.communicate(timeout=120)[0] for rank in ranks]
            assert all(float(re.search(r"^seconds (.*)", text, re.MULTILINE)[1]) < 15 for text in message), message
            for text in message:
                wanted = "DeviceMesh" if reached else "LaunchError: rank 0 and rank 1 cannot connect to each other (127.0.0.1"
                assert wanted in text, message
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
