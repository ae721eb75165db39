"""Seq2SeqTrainer on an encoder-decoder, each batch on two ranks, against one process. Tolerance as in test_trainer_loss."""

import json
from pathlib import Path

import pytest
import torch
from spawn import finish, start

pytest.importorskip("accelerate")

JOB = str(Path(__file__).parents[1] / "support" / "seq2seq_trainer_job.py")
CLOSE = 32 * torch.finfo(torch.float32).eps  # two steps of AdamW, whose first one turns roundings of small gradients into signs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_losses_gradients_and_predictions_are_those_of_plain_trainer(tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    for process in [start([JOB, str(alone)]), start([JOB, str(two)], ranks=2)]:  # at the same time
        code, _, err = finish(process, timeout=150)
        assert code == 0, err
    wanted, actual = (json.loads(path.read_text()) for path in (alone, two))
    assert "set_attn_implementation('sdpa')" in actual.pop("generating")
    for kind, of_one in wanted.items():
        for what, numbers in of_one.items():
            assert actual[kind][what] == pytest.approx(numbers, rel=CLOSE), (kind, what)
    assert actual["smoothed"]["logged"][0] != pytest.approx(actual["plain"]["logged"][0], rel=1e-3)
