"""What Trainer makes of losses and predictions, on two ranks and in one process: accumulation, own losses, smoothing, metrics.

Parameters are fp64, losses of the model itself fp32: its roundings are allowed, as in test_trainer. A mean of means is off by
percents, a gradient that is summed where it is averaged by a factor.
"""

import json
from pathlib import Path

import pytest
import torch
from spawn import finish, start

pytest.importorskip("accelerate")

JOB = str(Path(__file__).parents[1] / "support" / "trainer_loss_job.py")
CLOSE = 32 * torch.finfo(torch.float32).eps  # two steps of AdamW, whose first one turns roundings of small gradients into signs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_losses_gradients_predictions_and_metrics_are_those_of_plain_trainer(tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    for process in [start([JOB, str(alone)]), start([JOB, str(two)], ranks=2)]:  # at the same time
        code, _, err = finish(process, timeout=150)
        assert code == 0, err
    wanted, actual = (json.loads(path.read_text()) for path in (alone, two))
    smoothed, halves, generated = actual.pop("refused")
    assert "neftune_noise_alpha=5.0" in smoothed
    assert "eval_use_gather_object" in halves
    assert "predict_with_generate generates" in generated
    assert set(actual) == set(wanted)
    for kind, of_one in wanted.items():
        for what, numbers in of_one.items():
            assert actual[kind][what] == pytest.approx(numbers, rel=CLOSE), (kind, what)
    first = {kind: results["logged"][0] for kind, results in actual.items()}
    assert first["a class below"] == pytest.approx(10 * first["plain"], rel=CLOSE)
    assert first["label smoothing"] != pytest.approx(first["plain"], rel=1e-6)
