"""`ringattn report`: one file that tells whoever looks for a bug what they would have asked, and nobody's secrets."""

import zipfile
from pathlib import Path

import pytest
from spawn import finish, start, torchrun

from ringattn import InputError
from ringattn.diagnostics import bug_report as report
from ringattn.diagnostics.doctor import Finding

pytestmark = pytest.mark.slow


def packed(file: Path) -> dict[str, str]:
    with zipfile.ZipFile(file) as candidate:
        return {name: candidate.read(name).decode() for name in candidate.namelist()}


def test_it_holds_findings_surroundings_and_the_ends_of_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "secret")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("HOME_OF_NOBODY", "elsewhere")
    run = tmp_path / "run"
    (run / "a/b/c").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("begin\n" + "x" * report.END)
    (run / "weights.distcp").write_text("large")
    (run / "a/b/c/deep.log").write_text("too deep")
    names = report.write(tmp_path / "new/out.zip", [Finding("torch", "2.13", "update it")], [run])
    candidate = packed(tmp_path / "new/out.zip")
    assert list(candidate) == names and len([name for name in names if name.startswith("logs/")]) == 1
    assert candidate["doctor.txt"] == "torch: 2.13 (TO DO: update it)\n"
    assert "NCCL_DEBUG=INFO" in candidate["environment.txt"]
    assert "secret" not in candidate["environment.txt"] and "elsewhere" not in candidate["environment.txt"]
    assert "torch==" in candidate["packages.txt"] and "RLIMIT_MEMLOCK" in candidate["system.txt"]
    assert candidate[f"logs{run}/metrics.jsonl"] == "x" * report.END


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: there is no such file or folder"):
        report.write(tmp_path / "out.zip", [], [tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/out.zip: cannot be written"):
        report.write(tmp_path / "file/out.zip", [], [])


def test_one_command_alone_and_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text("what it said")
    code, out, err = finish(start(["-m", "ringattn", "report", str(tmp_path), "--out", str(tmp_path / "one.zip")]), 50)
    assert code == 0 and "doctor.txt" in out, err
    candidate = packed(tmp_path / "one.zip")
    assert "sdpa kernel" in candidate["doctor.txt"] and candidate[f"logs{tmp_path}/rank0.log"] == "what it said"
    code, out, err = torchrun("-m", "ringattn", "report", "--out", str(tmp_path / "two.zip"), ranks=2)
    assert code == 0 and out.count("doctor.txt") == 1, err
    assert "every rank connects to every other" in packed(tmp_path / "two.zip")["doctor.txt"]


def test_a_job_that_does_not_come_together_is_reported_too(tmp_path: Path) -> None:
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="no number")
    code, _, err = finish(start(["-m", "ringattn", "report", "--out", str(tmp_path / "out.zip")], **place), 50)
    assert code == 0, err
    assert "torchrun's environment is damaged" in packed(tmp_path / "out.zip")["doctor.txt"]
