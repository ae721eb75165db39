"""torchrun's place in the laboratory: one rank on each host, with real links of the given rate between them.

    python benchmarks/netlab/run.py --kind mesh --hosts 4 --mbit 50 benchmarks/attention.py --mask full --dtype bfloat16

Any script that torchrun could start runs unchanged; what follows its name goes to it, with {topology} replaced by a file that
describes the laboratory's links to the planner. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import KINDS, Lab

PORT = 29400


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="mesh")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=50.0, help="of a link, or of a port (switch), in each direction")
    parser.add_argument("--uplink-mbit", type=float, help="between nodes, of all hosts together (nodes) or each (rails)")
    parser.add_argument("--gflops", type=float, default=20.0, help="what {topology} says that a rank computes at")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which every rank is stopped")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python script and its arguments")
    asked = parser.parse_args()
    if not asked.script:
        parser.error("name a script to run on every host")
    with Lab(asked.kind, asked.hosts, asked.mbit, asked.uplink_mbit) as lab, TemporaryDirectory() as folder:
        topology = Path(folder) / "topology.json"
        lab.topology(asked.gflops * 1e9).save(topology)
        script = [word.replace("{topology}", str(topology)) for word in asked.script]
        return _run_on_all(lab, script, time.monotonic() + asked.timeout)


def _run_on_all(lab: Lab, script: list[str], deadline: float) -> int:
    ranks = [
        subprocess.Popen([*lab.inside(rank), sys.executable, *script], env=os.environ | _environment(lab, rank))
        for rank in range(lab.hosts)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):  # one has failed: the others would wait for it
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.1)
        ended = [rank.poll() for rank in ranks]
        return max(1 if status is None else abs(status) for status in ended)
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()


def _environment(lab: Lab, rank: int) -> dict[str, str]:
    """What torchrun would set, and the interface gloo is to use."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(lab.hosts),
        "MASTER_ADDR": lab.address(0),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
