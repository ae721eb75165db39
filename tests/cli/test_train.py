"""The main job as a user starts it: real torchrun, small sizes."""

import io
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import spawn
import torch
from spawn import finish, start
from thirty import DEADLINE

from ringattn import InputError
from ringattn.cli.train import TrainConfig, read_corpus, windows
from ringattn.cli.train.report import Log
from ringattn.cli.train.restart import checkpoint_to_resume

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
SMALL = shlex.split("--seq-len 203 --batch 2 --dim 24 --heads 3 --kv-heads 3 --head-dim 8 --hidden-dim 32 --warmup 3")
LEARNED = ("step", "loss", "bits_per_byte", "gradient_norm", "lr")  # the rest of a line is time


def torchrun(*flags: str, ranks: int = 2) -> tuple[str, str]:
    code, out, err = spawn.torchrun(str(TRAIN), *SMALL, *flags, ranks=ranks)
    assert code == 0, err
    return out, err


def rank(number: int, world: int, port: int, *flags: str) -> subprocess.Popen:
    """One rank without torchrun's agent, so that its own exit code can be seen."""
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    return start([str(TRAIN), *SMALL, *flags], **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def learned(directory: Path) -> list[tuple]:
    return [tuple(line[name] for name in LEARNED) for line in metrics(directory)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps in one go: its directory and what it said."""
    directory = tmp_path_factory.mktemp("train") / "straight"
    return directory, *torchrun("--steps", "6", "--out", str(directory))


def test_every_step_is_logged(straight):
    directory, _, err = straight
    lines = metrics(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {*LEARNED, "seconds", "tokens_per_second"} == set(lines[0])
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["tokens_per_second"] == pytest.approx(2 * 203 / line["seconds"])
        assert f"step {line['step']}/6  loss {line['loss']:.4f}" in err
    assert lines[0]["bits_per_byte"] == pytest.approx(8, abs=0.2)  # knows nothing yet
    assert lines[-1]["bits_per_byte"] < lines[0]["bits_per_byte"] - 0.3
    assert [line["lr"] / 4e-3 for line in lines[:4]] == pytest.approx([1 / 3, 2 / 3, 1, math.sqrt(3 / 4)])


def test_the_run_ends_with_a_table_and_pictures(straight):
    directory, out, _ = straight
    for message in ("throughput", "attention sends", "gradient reduction sends", "peak memory", "communication"):
        assert message in out
    for picture in ("loss.png", "timeline.png"):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG")
    assert (directory / "step_00000006").is_dir()


def test_a_resumed_run_is_bit_identical_and_logs_nothing_twice(straight, tmp_path):
    torchrun("--steps", "3", "--no-plots", "--out", str(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # it went on beyond its checkpoint and died while writing
        file.write(json.dumps(metrics(tmp_path)[-1] | {"step": 4, "loss": 0.0}) + '\n{"step": 5, "lo')
    torchrun("--steps", "6", "--no-plots", "--resume", "--out", str(tmp_path))
    assert learned(tmp_path) == learned(straight[0])


@pytest.mark.case(27)
def test_sigterm_to_one_rank_ends_all_with_a_checkpoint_and_exit_code_0(tmp_path, record_property):
    port = free_port()
    ranks = [rank(r, 2, port, "--steps", "100000", "--save-every", "0", "--no-plots", "--out", str(tmp_path)) for r in (0, 1)]
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 30
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    for process in ranks:
        code, _, err = finish(process, timeout=DEADLINE + 5)
        assert code == 0, err
    record_property("seconds", time.monotonic() - begin)
    assert [p.name for p in tmp_path.glob("step_*")] == [f"step_{metrics(tmp_path)[-1]['step']:08d}"]


@pytest.mark.parametrize("merge", ["similar", "gate"])
def test_it_trains_on_merged_tokens_and_resumes_bit_by_bit(merge, tmp_path):
    flags = ("--merge", merge, "--layers", "3", "--no-plots", "--save-every", "2", "--steps", "4", "--out", str(tmp_path))
    out, _ = torchrun(*flags)
    assert ("merged" in out) == (merge != "gate")  # whose training is on all tokens
    straight = learned(tmp_path)
    shutil.rmtree(tmp_path / "step_00000004")
    torchrun(*flags, "--resume")
    assert learned(tmp_path) == straight


@pytest.mark.case(26)
def test_another_number_of_ranks_goes_on_when_asked_and_up_to_rounding(straight, tmp_path):
    torchrun("--steps", "3", "--no-plots", "--out", str(tmp_path))
    flags = ("--steps", "6", "--no-plots", "--resume", "--out", str(tmp_path))
    assert "was made by 2 ranks and this job has 1" in error_paragraph(rank(0, 1, free_port(), *flags))
    code, _, err = finish(rank(0, 1, free_port(), *flags, "--any-world"), timeout=120)
    assert code == 0, err
    actual, wanted = ([line["loss"] for line in metrics(folder)] for folder in (tmp_path, straight[0]))
    # fp32 sums over two ranks or one: 2^-24 each, and three steps in which AdamW divides by small numbers
    assert actual == pytest.approx(wanted, rel=1e-5) and len(actual) == 6


def error_paragraph(process: subprocess.Popen) -> str:
    """What a failing run says: one paragraph and no traceback."""
    code, out, err = finish(process, timeout=120)
    assert code == 1 and out == "", err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.case(18)
def test_without_torchrun_it_says_how_to_start(tmp_path):
    message = error_paragraph(start([str(TRAIN), "--out", str(tmp_path)]))
    assert "torchrun --nproc-per-node" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--schedule star_ring", "star_ring"),
        ("--heads 3 --kv-heads 2", "heads=3 is not a multiple of kv_heads=2"),
        ("--data nowhere.txt", "--data nowhere.txt: there is no such file or directory"),
        ("--resume --out nowhere", "--resume: there is no complete checkpoint in nowhere"),
        ("--batch 0", "--batch 0: must be 1 or more"),
        ("--merge windows --merge-layers 1 5", "first=1, last=5: blocks [first, last) must be some of the 2"),
    ],
)
def test_flags_that_cannot_work_are_answered_in_one_paragraph(flags, message):
    assert message in error_paragraph(rank(0, 1, free_port(), *flags.split()))


def test_a_checkpoint_of_another_configuration_is_refused(straight):
    message = error_paragraph(rank(0, 1, free_port(), "--resume", "--steps", "9", "--lr", "0.5", "--out", str(straight[0])))
    assert "lr is 0.5 and was 0.004" in message
    assert len(metrics(straight[0])) == 6


def test_a_finished_run_is_moved_aside_not_overwritten(tmp_path):
    config = TrainConfig(out=tmp_path / "run")
    for n in (1, 2):
        assert checkpoint_to_resume(config) is None
        (config.out / "metrics.jsonl").write_text(f"run {n}")
    assert checkpoint_to_resume(config) is None
    assert not list(config.out.iterdir())
    assert [(tmp_path / f"run.{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["run 1", "run 2"]


def test_windows_depend_on_seed_and_step_alone(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "binary").write_bytes(b"zero\0")
    corpus = read_corpus([tmp_path])
    assert bytes(corpus.tolist()) == b"first\nsecond"
    corpus = torch.arange(200, dtype=torch.uint8)
    drawn = windows(corpus, seq_len=50, batch=3, seed=0, step=1)
    assert drawn.dtype == torch.int64 and drawn.shape == (3, 50)
    assert torch.equal(drawn, windows(corpus, seq_len=50, batch=3, seed=0, step=1))
    assert not torch.equal(drawn, windows(corpus, seq_len=50, batch=3, seed=0, step=2))
    assert not torch.equal(drawn, windows(corpus, seq_len=50, batch=3, seed=1, step=1))
    assert torch.equal(windows(corpus, seq_len=200, batch=1, seed=0, step=1)[0], torch.arange(200))
    with pytest.raises(InputError, match="--data holds 200 bytes, less than one window of --seq-len 201"):
        windows(corpus, seq_len=201, batch=1, seed=0, step=1)


@pytest.mark.case(22)
def test_a_killed_rank_costs_nothing_under_max_restarts(tmp_path, record_property):
    """torchrun starts all ranks anew; each step is logged once, with the losses of a run that nothing happened to. The journal
    tells when the second attempt has gone on."""
    flags = ("--steps", "30", "--save-every", "2", "--no-plots", "--auto-resume")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    torchrun(*flags, "--out", str(calm))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    journal = tmp_path / "journal"
    agent = start([*launch, str(TRAIN), *SMALL, *flags, "--out", str(killed), "--journal", str(journal)])
    until = time.monotonic() + 40
    while not list(killed.glob("step_*")) and time.monotonic() < until:
        time.sleep(0.02)
    begin = time.time()
    workers = [pid for pid in spawn.descendants(agent.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    code, _, err = finish(agent, timeout=120)
    assert code == 0, err
    assert err.count("parameters, ") == 2, "the run was not interrupted"
    assert learned(killed) == learned(calm)
    events = [json.loads(line) for line in (journal / "rank00000.jsonl").read_text().splitlines()]
    again = [event["time"] for event in events if event["event"] == "resumed"]
    assert [event["attempt"] for event in events if event["event"] == "begin"] == [0, 1] and len(again) == 1
    record_property("seconds", again[0] - begin)
    # Two interpreters import torch in this time, which takes as much longer as other processes want the cores.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert again[0] - begin < 10 * crowd


@pytest.mark.case(25)
def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path):
    torchrun("--steps", "4", "--save-every", "2", "--no-plots", "--out", str(tmp_path))
    shard = next((tmp_path / "step_00000004").glob("__0_*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    _, err = torchrun("--steps", "6", "--no-plots", "--resume", "--out", str(tmp_path))
    assert shard.name in err and "is damaged" in err and "using the one before it" in err
    assert learned(tmp_path) == learned(straight[0])


def test_a_rank_that_dies_while_it_trims_the_log_loses_no_line(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path / "metrics.jsonl", reports=True, done=2, steps=9)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.case(29)
def test_metrics_that_cannot_be_written_cost_a_warning_and_no_training(tmp_path, capsys):
    line = {"loss": 1.0, "bits_per_byte": 1.0, "tokens_per_second": 1.0, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").mkdir()
    with Log(tmp_path / "metrics.jsonl", reports=True, done=0, steps=2) as log:
        log.step(line | {"step": 1})
    with Log(tmp_path / "other.jsonl", reports=True, done=0, steps=2) as log:
        log.file.close()
        log.file = full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
        log.step(line | {"step": 1})
        log.step(line | {"step": 2})
    full.detach()  # or its end would fail as well
    message = capsys.readouterr().err
    assert message.count("warning: metrics are no longer written") == 2 and "No space left" in message and "step 2/2" in message
