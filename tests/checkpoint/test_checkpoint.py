"""Checkpoints: what was saved comes back, and nothing else is taken for one."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from spawn import finish, run_ranks, start

from ringattn import CheckpointError
from ringattn.checkpoint import store as checkpoint
from ringattn.checkpoint.async_save import Saver
from ringattn.checkpoint.store import write_state

CONFIG = {"dim": 4, "data": ("a", "b")}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process: nothing to coordinate


def training(seed: int = 0, width: int = 4, layers: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(4 if n == 0 else width, width) for n in range(layers)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Losses on random data, so that they depend on parameters, moments and random state."""
    losses = []
    for _ in range(count):
        loss = model(torch.randn(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_on_bit_by_bit(tmp_path):
    model, optimizer = training()
    steps(model, optimizer, 3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, config=CONFIG)
    expected = steps(model, optimizer, 3)
    again = training(seed=9)
    assert checkpoint.load(path, *again, config=CONFIG) == 3
    assert steps(*again, 3) == expected


def test_the_newest_complete_checkpoint_is_the_latest_and_old_ones_go(tmp_path):
    model, optimizer = training()
    assert checkpoint.latest(tmp_path / "nowhere") is None
    (tmp_path / ".step_00000001").mkdir()  # left by a job that died
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, keep=2)
    (tmp_path / "step_00000200").mkdir()  # without ringattn.json: not a checkpoint
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000100"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000100", "step_00000200"]


def test_what_was_just_saved_stays_whatever_else_there_is(tmp_path):
    for step in (100, 110, 55, 56):
        path = checkpoint.save(tmp_path, step, *training(), keep=2)
        assert path.is_dir() and checkpoint.damage(path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000056", "step_00000110"]


def test_a_job_that_dies_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    path, rename = checkpoint.save(tmp_path, 1, *training(), keep=1), Path.rename

    def dies(self, target):
        if target == path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, *training(), keep=1)
    monkeypatch.undo()
    assert not path.exists() and checkpoint.resume(tmp_path, *training()) == 1
    checkpoint.save(tmp_path, 2, *training(), keep=2)
    assert [p.name for p in (checkpoint.latest(tmp_path),)] == ["step_00000002"]
    checkpoint.save(tmp_path, 1, *training(), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_step_can_be_saved_again(tmp_path):
    model, optimizer = training()
    checkpoint.save(tmp_path, 1, model, optimizer)
    steps(model, optimizer, 1)
    path = checkpoint.save(tmp_path, 1, model, optimizer)
    again = training(seed=9)
    checkpoint.load(path, *again)
    assert torch.equal(again[0][0].weight, model[0].weight)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, 1, *training(), config=CONFIG)
    with pytest.raises(CheckpointError, match="dim is 5 and was 4"):
        checkpoint.load(path, *training(), config={**CONFIG, "dim": 5})
    with pytest.raises(CheckpointError, match="heads is 2 and was None"):
        checkpoint.load(path, *training(), config={**CONFIG, "heads": 2})
    with pytest.raises(CheckpointError, match=r"Size mismatch .* for model.0.weight"):
        checkpoint.load(path, *training(width=5), config=CONFIG)
    with pytest.raises(CheckpointError, match=r"Missing key .* model.2.weight"):
        checkpoint.load(path, *training(layers=3), config=CONFIG)
    with pytest.raises(CheckpointError, match=r"holds more than this model has: model.1.weight and 1 more"):
        checkpoint.load(path, *training(layers=1), config=CONFIG)


def test_missing_and_damaged_checkpoints_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*step_00000007"):
        checkpoint.load(tmp_path / "step_00000007", *training())
    path = checkpoint.save(tmp_path, 1, *training())
    about, metadata = path / "ringattn.json", path / ".metadata"
    text = about.read_text()
    for broken in ("", "[]", json.dumps({"step": 1})):
        about.write_text(broken)
        with pytest.raises(CheckpointError, match="incomplete or damaged"):
            checkpoint.load(path, *training())
    about.write_text(text)
    metadata.unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoint.load(path, *training())


@pytest.mark.case(25)
def test_resume_takes_the_newest_sound_one(tmp_path):
    assert checkpoint.resume(tmp_path, *training()) == 0
    paths = [checkpoint.save(tmp_path, step, *training(), keep=3) for step in (1, 2, 3)]
    assert [checkpoint.damage(path) for path in paths] == [None] * 3
    shard = next(paths[2].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    next(paths[1].glob("*.distcp")).unlink()
    with pytest.warns(UserWarning) as raised:
        assert checkpoint.resume(tmp_path, *training()) == 1
    assert "step_00000003 is damaged" in str(raised[0].message) and "distcp has digest" in str(raised[0].message)
    assert any(
        "step_00000002 is damaged" in str(warning.message) and "is missing" in str(warning.message) for warning in raised
    )
    (paths[1] / "__0_0.distcp").mkdir()  # cannot be read
    assert "s a directory" in checkpoint.damage(paths[1])
    with pytest.raises(CheckpointError, match=r"step_00000003 is incomplete: .*Error.*use the one before it"):
        (paths[2] / ".metadata").write_bytes((paths[2] / ".metadata").read_bytes()[:-9])
        checkpoint.load(paths[2], *training())
    (paths[0] / ".metadata").write_text("")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound: .*step_00000001"):
        checkpoint.resume(tmp_path, *training())


def test_a_saver_writes_what_was_while_training_goes_on(tmp_path, monkeypatch):
    model, optimizer = training()
    steps(model, optimizer, 2)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        assert go_on.wait(20)
        return write_state(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_state", slow)
    saver = Saver(tmp_path, config=CONFIG)
    saver.save(2, model, optimizer)
    assert begun.wait(20)
    expected = steps(model, optimizer, 3)  # while it is being written
    assert checkpoint.latest(tmp_path) is None
    go_on.set()
    assert saver.finish() == tmp_path / "step_00000002" and saver.finish() is None
    again = training(seed=9)
    assert checkpoint.resume(tmp_path, *again, config=CONFIG) == 2
    assert steps(*again, 3) == expected


def fail_later(rank: int, directory: Path) -> list[str]:
    saver, raised = Saver(directory), []
    for call in (lambda: saver.save(1, *training()), lambda: saver.save(2, *training()), saver.finish):
        try:
            call()
            raised.append("")
        except CheckpointError as error:
            raised.append(str(error))
    return raised


def test_a_saver_tells_every_rank_of_a_failure_with_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = run_ranks(2, fail_later, tmp_path / "file")
    assert first == second and [("cannot prepare" in message) for message in first] == [False, True, False]


DIES_WRITING = """
import os, signal, sys, torch
from ringattn import checkpoint
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
checkpoint.save(sys.argv[1], 1, model, optimizer)
os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], 2, model, optimizer)
"""


@pytest.mark.case(23)
def test_a_process_that_dies_while_writing_leaves_the_one_before(tmp_path):
    code, *_ = finish(start(["-c", DIES_WRITING, str(tmp_path)]), timeout=120)
    assert code == -signal.SIGKILL
    assert list(tmp_path.glob(".step_00000002"))
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001" and checkpoint.damage(tmp_path / "step_00000001") is None
    checkpoint.save(tmp_path, 3, *training())
    assert not list(tmp_path.glob(".step_*"))


@pytest.mark.case(24)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")
def test_a_full_disk_costs_nothing_that_is_saved(tmp_path, record_property):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = checkpoint.save(tmp_path, 1, *training(), keep=1)
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*, 0\.\d MB were left free there"):
            checkpoint.save(tmp_path, 2, *training(width=400), keep=1)
        record_property("seconds", time.monotonic() - begin)
        assert time.monotonic() - begin < 3 and not list(tmp_path.glob(".step_*"))
        assert checkpoint.latest(tmp_path) == path and checkpoint.damage(path) is None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.case(24)
def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot prepare"):
        checkpoint.save(tmp_path / "file", 1, *training())
    with pytest.raises(CheckpointError, match="keep=0"):
        checkpoint.save(tmp_path, 1, *training(), keep=0)


def save_on_ranks(rank: int, directory: Path) -> list[float]:
    model, optimizer = training()
    torch.manual_seed(rank)  # replicated parameters, but each rank's own random state
    checkpoint.save(directory, 5, model, optimizer)
    return torch.rand(2).tolist()


def load_on_ranks(rank: int, directory: Path) -> tuple[list[float], list[float]]:
    model, optimizer = training(seed=9)
    path = checkpoint.latest(directory)
    assert path is not None
    with pytest.raises(CheckpointError, match="was made by 2 ranks and this job has 3"):
        checkpoint.load(path, model, optimizer)
    assert checkpoint.load(path, model, optimizer, any_world=True) == 5
    return torch.rand(2).tolist(), model[0].bias.tolist()


def apart(rank: int, directory: Path) -> list[str]:
    """What is wrong on one rank, or differs between them, is raised on both and costs nothing."""
    sound = checkpoint.save(directory, 1, *training(), config=CONFIG, keep=1)
    calls = (
        lambda: checkpoint.save(directory / f"of rank {rank}", 2, *training(), keep=1),
        lambda: checkpoint.save(directory / f"of rank {rank}", 2, *training(), keep=1),
        lambda: checkpoint.save(directory, 2 + rank, *training(), keep=1),
        lambda: checkpoint.load(sound, *training(), config=CONFIG if rank == 0 else {"dim": 5}),
        lambda: checkpoint.load(sound if rank == 0 else directory / "elsewhere", *training(), config=CONFIG),
    )
    message = []
    for call in calls:
        try:
            call()
            message.append("no error")
        except CheckpointError as error:
            message.append(str(error).replace(f"of rank {rank}", "its own"))
    assert checkpoint.damage(sound) is None and checkpoint.load(sound, *training(), config=CONFIG) == 1
    return message


def test_ranks_that_part_ways_lose_no_checkpoint(tmp_path):
    first, second = run_ranks(2, apart, tmp_path)
    words = ("all ranks must write into one directory", "all ranks must write into one directory", "step is 2 on rank 0 and 3")
    words += ("on rank 1: checkpoint", "on rank 1: there is no checkpoint")
    for wanted, of_first, of_second in zip(words, first, second, strict=True):
        assert wanted in of_first and wanted in of_second, (of_first, of_second)


def fail_on_ranks(rank: int, directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(directory, 5, *training())
    return str(caught.value)


@pytest.mark.case(26)
def test_any_number_of_ranks_can_load(tmp_path):
    drawn = run_ranks(2, save_on_ranks, tmp_path)
    assert drawn[0] != drawn[1]
    bias = training()[0][0].bias.tolist()
    assert run_ranks(3, load_on_ranks, tmp_path) == [(drawn[0], bias), (drawn[1], bias), (drawn[0], bias)]


def test_every_rank_learns_that_rank_0_could_not_write(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = run_ranks(2, fail_on_ranks, tmp_path / "file")
    assert first == second and "cannot prepare" in first
