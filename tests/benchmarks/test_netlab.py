"""The laboratory of real links: hosts reach each other, and no faster than they may. Needs root and iproute2."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import namespaces_allowed

RUN = Path(__file__).parents[2] / "benchmarks" / "netlab" / "run.py"
SCRIPT = """
import sys, time, torch, torch.distributed as dist, ringattn
from ringattn.comm.gloo_duplex import finish, receiving, sending
mesh = ringattn.init()
group, rank = mesh.get_group(), mesh.get_local_rank()
topology = ringattn.load_topology(sys.argv[1])
there, back = torch.zeros(1 << 18, dtype=torch.uint8), torch.zeros(1 << 18, dtype=torch.uint8)
for _ in range(2):
    dist.barrier()
    begin = time.perf_counter()
    finish([sending(there, group, rank, 1 - rank), receiving(back, group, rank, 1 - rank)])
    seconds = time.perf_counter() - begin
if rank == 0:
    print("kind", topology.kind, "expected", (1 << 18) / topology.route(0, 1)[0][1], "took", seconds)
"""


@pytest.mark.slow
@pytest.mark.skipif(not namespaces_allowed(), reason="needs root and iproute2, and namespaces allowed")
@pytest.mark.parametrize("kind", ["mesh", "switch", "nodes", "rails"])
def test_a_link_carries_no_more_than_it_was_given(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "link.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(RUN), "--kind", kind, "--hosts", "2", "--mbit", "40", "--uplink-mbit", "20"]
    ran = subprocess.run([*command, str(script), "{topology}"], capture_output=True, text=True, timeout=120)
    if "Operation not" in ran.stderr or "qdisc kind is unknown" in ran.stderr:
        pytest.skip(f"this kernel shapes no links: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.split()
    assert words[1] == {"rails": "nodes"}.get(kind, kind)
    expected, took = float(words[3]), float(words[5])
    # A bucket of 8 kB passes unshaped, a few percent of what is sent. No upper limit: a busy machine may take its time.
    assert took > 0.9 * expected, f"both ways at once: {took:.3f} s where the link needs {expected:.3f} s"
