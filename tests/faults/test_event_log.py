"""Event logs: what each rank did, in a file that survives it; and the same names in a profile."""

import json
from pathlib import Path

import pytest
import torch
from hostile import VALUES
from processes import environment
from spawn import finish, run_ranks, start
from torch.profiler import ProfilerActivity, profile

import ringattn
from ringattn import attention, make_plan, shard
from ringattn.faults import event_log
from ringattn.runtime import note

RANKS = 2


def plan_for(schedule: str) -> ringattn.Plan:
    return make_plan(37, world=RANKS, heads=2, head_dim=8, schedule=schedule, topology="cpu")


def step(schedule: str) -> ringattn.Plan:
    plan = plan_for(schedule)
    q = shard(torch.randn(1, 37, 2, 8), plan).requires_grad_()
    attention(q, q, q, plan).sum().backward()
    return plan


def writes(rank: int, folder: Path) -> None:
    step("ring")  # there is no event log yet
    event_log.begin(folder, about="a test")
    step("token_ring")
    note("of my own", shape=(1, 2), tensor=torch.float32)


def test_each_pass_is_a_line_that_names_the_longest_wait(tmp_path: Path) -> None:
    run_ranks(RANKS, writes, tmp_path / "new")
    plan = plan_for("token_ring")
    for rank in range(RANKS):
        begin, *passes, own = [json.loads(line) for line in (tmp_path / f"new/rank{rank:05d}.jsonl").read_text().splitlines()]
        assert begin["event"] == "begin" and begin["about"] == "a test" and begin["time"] < own["time"]
        assert own["event"] == "of my own" and own["shape"] == [1, 2] and own["tensor"] == "torch.float32"
        assert [line["name"] for line in passes] == [plan.pass_name(backward=b) for b in (False, True)]
        for line, backward in zip(passes, (False, True), strict=True):
            messages = [m for m in plan.messages(backward=backward) if rank in (m.src, m.dst)]
            assert line["longest"] in map(str, messages) and line["bytes_sent"] > 0
            assert 0 < line["longest_seconds"] <= line["waited"] + 1e-6 <= line["seconds"] + 2e-6


def goes_on(rank: int, folder: Path) -> None:
    event_log.begin(folder / "file", about="")
    step("ring")


@pytest.mark.case(29)
def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    run_ranks(RANKS, goes_on, tmp_path)
    capfd.readouterr()  # where their warnings went depends on which test started the server that forks them
    full = event_log.EventLog(tmp_path, 0)
    full._file.close()
    full._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    full.write("first", {})
    full.write("second", {})
    stderr = capfd.readouterr().err
    assert stderr.count("is no longer written: ") == 1 and "No space left" in stderr


def test_any_value_can_be_noted(tmp_path: Path) -> None:
    log, loop = event_log.EventLog(tmp_path, 0), []
    loop.append(loop)
    for value in (*VALUES.values(), loop):
        log.write("event", {"value": value})
    lines = (tmp_path / "rank00000.jsonl").read_text().splitlines()
    assert len(lines) == len(VALUES) + 1 and all(json.loads(line)["event"].strip("'") == "event" for line in lines)


def test_init_begins_one(tmp_path: Path) -> None:
    code = f"import ringattn; ringattn.init(journal={str(tmp_path)!r}); import ringattn.runtime as r; r.note('done')"
    ended, _, err = finish(start(["-c", code], **{name: str(value) for name, value in environment().items()}), timeout=120)
    assert ended == 0, err
    first, last = [json.loads(line) for line in (tmp_path / "rank00000.jsonl").read_text().splitlines()]
    assert (first["event"], first["world"], first["attempt"], first["backend"]) == ("begin", 1, 0, "gloo")
    assert last["event"] == "done"


def profiled(rank: int) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step("token_ring")
    return [event.key for event in profiler.key_averages() if event.key.startswith("ringattn/")]


def test_a_profile_shows_passes_by_the_schedules_name_and_their_steps() -> None:
    plan = plan_for("token_ring")
    for names in run_ranks(RANKS, profiled):
        assert {f"ringattn/{plan.pass_name(backward=b)}" for b in (False, True)} <= set(names)
        assert {"ringattn/step0/post", "ringattn/step1/wait"} <= set(names)
