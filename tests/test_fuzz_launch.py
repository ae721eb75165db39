"""Bad values for every flag of the main job and of the console script: they say what is wrong, and end."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest
from spawn import start

from ringattn.cli.train import TrainConfig
from ringattn.nn import Decoder, DecoderConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

NUMBERS = ["0", "-1", "1000000000", "9" * 30, "9" * 5000, "0.5", "nan", "inf", "-inf", "1e400"]
TEXTS = ["", "no such thing", "größe", "x" * 5000, "None", "/", "..", "/proc/no/such", "/dev/null/x", "[1, 2]"]
SMALL = ["--seq-len", "65", "--dim", "8", "--heads", "2", "--kv-heads", "2", "--head-dim", "4", "--hidden-dim", "8"]
ENDLESS = ("--steps",)  # as many as are asked for


def answers(which: str, cases: list[list[str]], tmp_path: Path) -> list[tuple[list[str], str, str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    process = start([str(ROOT / "tests" / "support" / "fuzz_job.py"), which, str(tmp_path / "cases.json")], **place)
    out, err = process.communicate(timeout=58)
    actual = [tuple(json.loads(line)) for line in out.splitlines() if line.startswith("[")]
    assert process.returncode == 0 and len(actual) == len(cases), (
        f"{cases[len(actual)][-2:]}: {process.returncode}\n{err[-5000:]}"
    )
    return actual


def flags() -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize("values", [NUMBERS, TEXTS], ids=["numbers", "texts"])
def test_every_flag_of_train(values: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be learned by heart " * 20)
    fine = [*SMALL, "--no-plots", "--steps", "1", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")]
    fine += ["--merge", "similar", "--merge-layers", "1", "2"]
    cases = [fine]
    for flag in flags():
        for value in values:
            if flag not in ENDLESS or value in ("0", "-1", *TEXTS):
                cases.append([*fine, flag, value, *[value] * (flag == "--merge-layers")])
    first, *others = answers("train", cases, tmp_path)
    assert first[1] == "end"
    for case, how, message in others:
        assert how in ("end", "exit 2") or how.startswith("raised "), f"{case[len(fine) :]}: {how}"
        assert "Traceback" not in message


@pytest.mark.parametrize("flag", ["--dim", "--batch", "--layers", "--hidden-dim", "--head-dim"])
def test_what_cannot_fit_says_how_much_it_needs(flag: str, tmp_path: Path) -> None:
    [(_, how, _)] = answers("train", [["--no-plots", "--out", str(tmp_path / "run"), flag, "1000000000"]], tmp_path)
    assert "raised InputError: a rank needs " in how and "GB or more" in how and " and has " in how, how


def test_the_number_of_parameters_is_that_of_the_model() -> None:
    config = DecoderConfig(vocab_size=17, dim=10, layers=3, heads=6, kv_heads=2, head_dim=4, hidden_dim=14)
    assert config.parameters == sum(p.numel() for p in Decoder(config).parameters())


PLAN = [
    "--world",
    "--heads",
    "--kv-heads",
    "--head-dim",
    "--dtype",
    "--mask",
    "--schedule",
    "--layout",
    "--ulysses",
    "--kernel",
]
PLAN += ["--topology", "--buffer-limit", "--kv-len", "--q-offset", "--partials", "--draw", "--draw-pass", "--top", "--training"]
MASKS = [
    "window:",
    "window:-1",
    "window:" + "9" * 5000,
    "documents:0,9,4",
    "documents:0,8",
    "full&",
    "prefix:1,2",
    "causal & no",
]


def test_every_flag_of_the_console_script(tmp_path: Path) -> None:
    fine = ["plan", "64", "--world", "2", "--heads", "2", "--head-dim", "8", "--schedule", "ring"]
    cases = [fine, ["plan", "-1", *fine[2:]], ["plan", "", *fine[2:]], ["plan"], [], ["doctor", "--no"], ["no such command"]]
    cases += [[*fine, flag, value] for flag in PLAN for value in (*NUMBERS, *TEXTS)]
    cases += [[*fine, "--mask", mask] for mask in MASKS]
    cases += [[*fine, "--schedule", "auto", "--world", world] for world in ("65", "1000000000")]
    cases += [
        ["probe", "--out", "links.json", flag, value]
        for flag in ("--megabytes", "--repeats")
        for value in (*NUMBERS[:2], *NUMBERS[3:])
    ]
    cases += [
        ["report", "no such folder"],
        ["report", "--out", ""],
        ["report", "--out", "/dev/null/x"],
        ["report", "--to", "x"],
    ]
    first, *others = answers("ringattn", cases, tmp_path)
    assert first[1] == "end"
    for case, how, message in others:
        assert how in ("end", "exit 2"), f"{case[-2:]}: {how}"
        assert "Traceback" not in message and (how == "end" or message.strip()), case
        if message.startswith("ringattn: "):
            assert len(message.splitlines()) == 1 and len(message) < 2000, message
