"""The GPU benchmark, small on a CPU: every stage runs, and one that breaks, hangs, dies or finds wrong numbers says so."""

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from spawn import descendants, finish, start

pytestmark = pytest.mark.slow

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
PAGE = GPU.parent.parent / "docs" / "gpu.md"
HIDDEN = ("tyro", "rich", "numpy", "scipy", "matplotlib", "transformers")  # none of which the machine with a GPU must have
STAGES = (
    *("environment", "correctness", "traps", "baselines", "efficiency", "launches"),
    *("merge", "memory", "graphs", "compiled", "symmetric", "nccl"),
)


def run(folder: Path, *arguments: str, timeout: float, **modules: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """Exit status, what was printed and the JSON of each stage; `modules` are put in front of what Python imports."""
    shadow = folder / "shadow"
    shadow.mkdir()
    for name in HIDDEN:
        modules.setdefault(name, f"raise ModuleNotFoundError({name!r}, name={name!r})")
    for name, code in modules.items():
        (shadow / f"{name}.py").write_text(code)
    command = [str(GPU / "run.py"), "--device", "cpu", "--out", str(folder / "out"), *arguments]
    code, out, err = finish(start(command, fresh=True, PYTHONPATH=str(shadow)), timeout)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "out").glob("*.json")}
    return code, out + err, results


@pytest.mark.timeout(420)  # a dozen processes that import torch, on a machine that runs other tests beside
def test_every_stage_runs_with_nothing_but_torch(tmp_path: Path) -> None:
    code, message, results = run(tmp_path, "--minutes", "5", timeout=400)
    assert code == 0, message
    for name in STAGES:
        result = results[name]
        expected = "not applicable" if name == "graphs" else "passed"
        assert (result["stage"], result["status"]) == (name, expected), (message, result)
        assert result["seconds"] > 0 and result["device"] == "cpu" and result["failures"] == []
        assert result["figures"] or name == "graphs"
        assert re.search(rf"^{name} +{expected} +[0-9.]+ s", message, re.MULTILINE)
    assert [stage["status"] for stage in results["run"]["stages"]].count("passed") == len(STAGES) - 1
    assert results["correctness"]["figures"]["errors"] and results["nccl"]["figures"]["killed_peer"]["seconds"] < 25
    # Forward is exact; in backward a block's last user may let go of it a moment before the plan does.
    off = {(row["schedule"], row["direction"]): row["off"] for row in results["memory"]["figures"]["memory"]}
    assert len(off) == 12 and all(abs(x) <= (0.001 if way == "forward" else 0.1) for (_, way), x in off.items()), off

    page = tmp_path / "gpu.md"
    page.write_text(PAGE.read_text())
    report = [str(GPU / "report.py"), str(tmp_path / "out"), "--into", str(page)]
    filled = []
    for _ in range(2):
        code, _, err = finish(start(report, fresh=True), timeout=120)
        assert code == 0, err
        filled.append(page.read_text())
    assert filled[0] == filled[1] != PAGE.read_text()
    markers = re.findall(r"<!-- gpu:\w+ -->", PAGE.read_text())
    assert markers == re.findall(r"<!-- gpu:\w+ -->", filled[0]) and len(markers) > 10
    assert "| environment | passed |" in filled[0] and "baselines-full.svg" in filled[0]
    assert (tmp_path / "out" / "baselines-full.svg").read_text().startswith("<svg")


@pytest.mark.timeout(180)
def test_a_broken_stage_costs_only_itself(tmp_path: Path) -> None:
    stages = "merge,environment,launches,traps"
    breaks = ("--break", "merge", "--break", "launches:hang")
    code, message, results = run(tmp_path, "--stages", stages, "--minutes", "0.7", *breaks, timeout=150)
    assert code == 1, message
    actual = {name: (results[name]["status"], "; ".join(results[name]["failures"])) for name in stages.split(",")}
    assert actual["merge"] == ("broken", "RuntimeError: broken on purpose"), message
    assert actual["environment"] == ("passed", ""), message
    assert actual["launches"][0] == "broken" and "killed at its limit" in actual["launches"][1], message
    assert actual["traps"][0] == "skipped" and "no time was left" in results["traps"]["left_out"][0], message
    assert "Traceback" in results["merge"]["output"]
    child = re.search(r"with process (\d+)", results["launches"]["output"])
    assert child is not None and not alive(int(child[1]))
    assert "not right: merge, launches" in message


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not asked does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_stage_that_dies_is_reported(tmp_path: Path) -> None:
    code, message, results = run(tmp_path, "--stages", "merge", "--minutes", "1", "--break", "merge:die", timeout=120)
    assert code == 1, message
    assert (results["merge"]["status"], results["merge"]["failures"]) == ("broken", ["died of SIGKILL"])


@pytest.mark.timeout(120)
def test_a_run_that_is_ended_leaves_no_process_and_keeps_what_it_had(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--stages", "merge", "--break", "merge:hang"]
    running, until = start([str(GPU / "run.py"), *arguments]), time.monotonic() + 60
    while not (actual := descendants(running.pid)[1:]) and time.monotonic() < until:  # the stage, and the child it starts
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    code, _, err = finish(running, timeout=20)
    assert code == 128 + signal.SIGTERM, err
    assert actual and not any(map(alive, actual))
    assert json.loads((tmp_path / "merge.json").read_text())["status"] == "running"


@pytest.mark.timeout(180)
def test_wrong_numbers_fail(tmp_path: Path) -> None:
    wrong = """
import ringattn.execution as execution
right = execution.attend
execution.attend = lambda *given: [(out * 1.05, lse) for out, lse in right(*given)]
"""
    code, message, results = run(tmp_path, "--stages", "correctness,traps", "--minutes", "2", timeout=150, sitecustomize=wrong)
    assert code == 1, message
    for name in ("correctness", "traps"):
        assert results[name]["status"] == "failed" and "out is off by 5 %" in results[name]["failures"][0], message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stages", "merge,merging"), "no stage merging; there are environment"),
        (("--break", "traps:melt"), "traps:melt; give one of"),
    ],
)
def test_unknown_stages_are_named(arguments: tuple[str, str], words: str, tmp_path: Path) -> None:
    code, _, err = finish(start([str(GPU / "run.py"), *arguments, "--out", str(tmp_path)]), timeout=120)
    assert code == 2 and words in err


def test_a_page_with_an_unknown_marker_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu:speed -->\n<!-- gpu:end -->\n")
    code, _, err = finish(start([str(GPU / "report.py"), str(tmp_path), "--into", str(page)]), timeout=120)
    assert code == 1 and "a marker for 'speed'" in err


@pytest.mark.skipif(sys.platform != "linux", reason="asks torch, which may find another kind of GPU elsewhere")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    code, _, err = finish(start([str(GPU / "run.py"), "--out", str(tmp_path / "out")], **hidden), timeout=120)
    assert code == 2 and "--device cpu" in err and not (tmp_path / "out").exists()
