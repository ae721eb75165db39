"""Which backend and GPU `init` takes, by stand-ins for torch.cuda: GPUs that all see, or a rank alone, shared or missing."""

import inspect
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import environment, free_port, run_alone
from spawn import run_ranks

import ringattn
from ringattn import LaunchError
from ringattn.runtime import gpus
from ringattn.runtime.gpus import VisibleGpus, choose, decide


def reports_of(*gpu: str | None, backend: str | None = None, host: str = "a", gpus: int = 1, **more: Any) -> list[VisibleGpus]:
    """Ranks of one host, each with the UUID of the GPU it would take."""
    given = dict(nccl=True, shares=False) | more
    return [VisibleGpus(backend, host, gpus if uuid else 0, (0, uuid) if uuid else None, **given) for uuid in gpu]


def test_nccl_where_every_rank_has_a_gpu_of_its_own_and_gloo_where_there_is_none() -> None:
    for backend in (None, "nccl"):
        assert decide(reports_of("u0", "u1", backend=backend)) == "nccl", "each rank sees one GPU, another one"
        assert (
            decide([*reports_of("u0", "u1", gpus=2, backend=backend), *reports_of("u2", host="b", backend=backend)]) == "nccl"
        )
    assert decide(reports_of(None, None)) == "gloo"
    assert decide(reports_of("u0", "u0", backend="gloo")) == "gloo"
    assert decide(reports_of("u0", "u0", backend="nccl", shares=True)) == "nccl", "NCCL has been told to allow it"


@pytest.mark.parametrize(
    ("everyone", "text"),
    [
        (
            reports_of("u0", "u0", "u0", "u0"),
            r"every rank would share one GPU \(u0\)\. GPUs: on a 4 ranks see 1\. Start as many",
        ),
        (reports_of("u0", "u1", "u0", gpus=2), r"ranks 0, 2 would share one GPU \(u0\)\. GPUs: on a 3 ranks see 2\."),
        (reports_of("u0", None), r"rank 1 sees no GPU\. GPUs: on a 2 ranks see 0 to 1\."),
        (
            [*reports_of("u0", "u1", gpus=2), *reports_of(None, None, host="b")],
            r"ranks 2, 3 see no GPU\. GPUs: on a 2 .* 2; on b 2 .* 0\.",
        ),
        (reports_of(None, None, backend="nccl"), r"every rank see no GPU|every rank sees no GPU"),
        (reports_of("u0", "u1", nccl=False), r"torch was built without NCCL"),
        ([*reports_of("u0", backend="nccl"), *reports_of("u1")], r"ranks disagree on backend: nccl on rank 0, None on rank 1"),
    ],
)
def test_gpus_that_are_not_one_for_each_rank_are_refused_with_the_cure(everyone: list[VisibleGpus], text: str) -> None:
    with pytest.raises(LaunchError) as raised:
        decide(everyone)
    assert re.search(text, str(raised.value)), str(raised.value)
    assert "init(backend='gloo')" in str(raised.value) or "pass the same" in str(raised.value)


def show_gpus(uuids: list[str], nccl: bool = True) -> None:
    """Let torch.cuda show these and no others."""
    torch.cuda.device_count = lambda: len(uuids)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=uuids[index])
    dist.is_nccl_available = lambda: nccl


def chosen(rank: int, world: int, visible: list[list[str]], local: list[int], file: str) -> str:
    """What a rank hears that is shown these GPUs."""
    show_gpus(visible[rank])
    env = {"RANK": rank, "LOCAL_RANK": local[rank], "WORLD_SIZE": world}
    try:
        return str(choose(dist.FileStore(file, world), env, None, 10.0))
    except LaunchError as error:
        return str(error)


@pytest.mark.parametrize(
    ("visible", "local", "expected"),
    [
        ([["u0", "u1"]] * 2, [0, 1], ["('nccl', 0)", "('nccl', 1)"]),  # torchrun
        ([["u0"], ["u1"]], [0, 1], ["('nccl', 0)", "('nccl', 0)"]),  # Slurm and Ray, each rank shown its own
        ([["u0"], ["u1"]], [0, 0], ["('nccl', 0)", "('nccl', 0)"]),
        ([[], []], [0, 1], ["('gloo', None)"] * 2),
        ([["u0"]] * 2, [0, 1], ["every rank would share one GPU (u0)"] * 2),
        ([["u0"], []], [0, 1], ["rank 1 sees no GPU"] * 2),
    ],
)
def test_every_rank_comes_to_the_same_answer(
    visible: list[list[str]], local: list[int], expected: list[str], tmp_path: Path
) -> None:
    message = run_ranks(2, chosen, 2, visible, local, str(tmp_path / "store"))
    assert all(want in got for want, got in zip(expected, message, strict=True)), message


def slow_timedelta(**given: float) -> timedelta:
    time.sleep(0.5)
    return timedelta(**given)


def shares(rank: int, port: int) -> str:
    """What `init` raises on this rank of two, both shown the same GPU. Rank 1 is slow to read what rank 0 has found."""
    dist.destroy_process_group()
    os.environ |= {name: str(value) for name, value in environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items()}
    os.environ["MASTER_PORT"] = str(port)
    show_gpus(["u0"])
    if rank == 1:
        gpus.timedelta = slow_timedelta
    try:
        ringattn.init(timeout=10)
    except LaunchError as error:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which run_ranks will end
        return str(error)
    return f"started {dist.get_backend()}"


def test_init_takes_gloo_silently_no_more() -> None:
    for message in run_ranks(2, shares, free_port()):
        assert message.startswith("not every rank has a GPU of its own: every rank would share one GPU (u0)"), message


class Options:
    """As torch.distributed.ProcessGroupNCCL.Options, which a build without CUDA does not have."""

    def __init__(self) -> None:
        self.is_high_priority_stream, self.config, self._timeout = False, SimpleNamespace(max_ctas=-1), None


def test_options_of_nccl_reach_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    taken: list[object] = []

    def make_group(backend: str, **given: Any) -> None:
        options = given["pg_options"]
        taken.append((backend, options.is_high_priority_stream, options.config.max_ctas))
        raise KeyboardInterrupt  # here NCCL would be needed

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"u{index}"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", make_group)
    for given, priority, ctas in (
        (dict(), True, -1),
        (dict(high_priority_stream=False, max_ctas=8), False, 8),
        (dict(backend="nccl", high_priority_stream=True, max_ctas=64), True, 64),
    ):
        for name, value in environment(LOCAL_RANK=1).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(KeyboardInterrupt):
            ringattn.init(**given)
        assert taken == [1, ("nccl", priority, ctas)], "the GPU of this local rank, and NCCL with its options"
        taken.clear()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(max_ctas=0), "max_ctas=0; must be 1 or more"),
        (dict(max_ctas=65), "max_ctas=65; must be 64 or less"),
        (dict(high_priority_stream=1), "high_priority_stream=1; must be True or False"),
    ],
)
def test_options_that_cannot_be_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(LaunchError, match=text):
        ringattn.init(**given)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ringattn.init(max_ctas=8)", "max_ctas=8 is an option of NCCL, and this job uses gloo; leave it out"),
        ("ringattn.init('gloo', high_priority_stream=True)", "high_priority_stream=True is an option of NCCL, and this job"),
        (
            "import torch.distributed as d; d.init_process_group(); ringattn.init(max_ctas=8)",
            "max_ctas=8 is an option of NCCL, given when a group is made, and the process group exists already",
        ),
        (
            "import torch.distributed as d; d.init_process_group(); ringattn.init('nccl')",
            "backend='nccl', and the existing process group has cpu:gloo; leave backend out",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(code: str, text: str) -> None:
    ran = run_alone(environment(), f"import ringattn; {code}")
    assert "LaunchError: " in ran.stderr and text in ran.stderr, ran.stderr


def test_a_group_that_exists_is_used_as_it_is() -> None:
    code = "import torch.distributed as d, ringattn; d.init_process_group(); print(ringattn.init().device_type)"
    assert run_alone(environment(), code).stdout.strip() == "cpu"


def test_init_only_gained_arguments() -> None:
    names = list(inspect.signature(ringattn.init).parameters)
    assert names == ["backend", "timeout", "journal", "high_priority_stream", "max_ctas", "transport"]
