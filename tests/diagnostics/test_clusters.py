"""Several nodes: `ringattn doctor` over all ranks, two torchrun agents, and the scripts for schedulers."""

import os
import shlex
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from processes import free_port
from spawn import finish, start, torchrun

from ringattn import LaunchError
from ringattn.diagnostics import cluster as together
from ringattn.diagnostics.doctor import Finding
from ringattn.runtime import hosts

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--seq-len 101 --dim 24 --heads 3 --kv-heads 3 --head-dim 8 --hidden-dim 32 --warmup 3 --steps 2 --no-plots"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def agent(port: int, *command: str) -> "subprocess.Popen[str]":
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "7", "--rdzv-backend", "c10d"]
    return start(["-m", "torch.distributed.run", *where, "--rdzv-endpoint", f"127.0.0.1:{port}", *command])


def test_doctor_examines_the_ranks_of_two_agents() -> None:
    port = free_port()
    agents = [agent(port, "-m", "ringattn", "doctor") for _ in range(2)]
    ends = [finish(agent, timeout=90) for agent in agents]
    assert [code for code, *_ in ends] == [0, 0], ends
    message = "".join(out for _, out, _ in ends)
    assert message.count("ringattn doctor") == 1  # rank 0 alone
    for word in (
        "4: ",
        "source of ringattn",
        "a plan's digest",
        "connects to every other",
        "GB/s each way",
        "sdpa kernel",
        "clocks",
    ):
        assert word in message, word


@pytest.mark.case(30)
def test_two_jobs_on_one_host_do_not_meet(tmp_path: Path) -> None:
    alone = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "launch/train.py"), *SMALL]
    jobs = [start([*alone, "--seed", str(n), "--out", str(tmp_path / str(n))]) for n in range(2)]
    ends = [finish(job, timeout=90) for job in jobs]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert all((tmp_path / str(n) / "step_00000002").is_dir() for n in range(2))


def test_what_differs_between_ranks_is_named_with_the_cure() -> None:
    same = {"ranks": "a", "torch": "2.13", "source of ringattn": "0"}
    actual = {f.what: f for f in together._compare([same, {**same, "ranks": "b"}, {**same, "source of ringattn": "1"}])}
    assert actual["ranks"] == Finding("ranks", "3: a on ranks 0, 2; b on rank 1")
    assert actual["torch"] == Finding("torch", "2.13 on every rank")
    assert actual["source of ringattn"].outcome == "0 on ranks 0, 1; 1 on rank 2"
    assert "install the same on every host" in actual["source of ringattn"].hint


def test_a_peer_that_cannot_be_reached_is_named() -> None:
    store = dist.HashStore()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        store.set("listens/1", f"127.0.0.1:{closed.getsockname()[1]}")  # bound, but nobody listens
        store.set("tried/1", "")
        failed = hosts.unreachable(store, 0, [1], 5.0)
    assert list(failed) == [1] and "127.0.0.1: " in failed[1] and "refused" in failed[1]


def test_an_interface_that_is_not_there_is_answered_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert hosts.address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "warp9")
    with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME=warp9: this host .* has .*lo.*; name one of these"):
        hosts.address()
    code, _, err = torchrun("-m", "ringattn", "doctor", ranks=2)
    assert code != 0 and "ringattn: GLOO_SOCKET_IFNAME=warp9" in err


@pytest.mark.parametrize("left", [9999, 60])
def test_the_slurm_script_starts_agents_and_requeues_near_its_limit(left: int, tmp_path: Path) -> None:
    """Every line of it runs; srun and scontrol are stand-ins: two agents on this machine, and a note of what was asked."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"export PATH={tmp_path}/bin:{Path(sys.executable).parent}:$PATH\n")
    stand_ins = {
        "scontrol": 'echo "$@" >> asked; [ "$1" = show ] && echo localhost || true',
        "srun": 'shift; echo "$@" >> asked; "$@" & first=$!; "$@"; code=$?; wait $first && exit $code',
    }
    if left < 300:  # a job that fails, of which only the end matters here
        stand_ins["torchrun"] = 'case "$*" in *doctor) echo ringattn doctor;; *) exit 1;; esac'
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    end = int(subprocess.run(["date", "+%s"], capture_output=True, text=True).stdout) + left
    slurm = dict(JOB_ID=free_port(), JOB_NODELIST="n[1-2]", NNODES=2, JOB_NAME="job", JOB_END_TIME=end, SUBMIT_DIR=tmp_path)
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"RANKS_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    command = ["bash", str(ROOT / "launch/slurm.sbatch"), *SMALL]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert "ringattn doctor" in ran.stdout
    assert (tmp_path / "runs/job/step_00000002").is_dir() == (left > 300)
    assert ("requeue" in (tmp_path / "asked").read_text()) == (left < 300)


def test_the_manifest_holds_together() -> None:
    runtime, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "ringattn"}
    assert runtime["metadata"]["name"] == "ringattn"
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert node["name"] == container["name"] == "node"  # what the operator looks for
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in node["template"]["spec"]["template"]["spec"]["volumes"]}
    message = textwrap.dedent(job["spec"]["trainer"]["args"][0])
    assert "-m ringattn doctor &&" in message and "launch/train.py --auto-resume" in message
