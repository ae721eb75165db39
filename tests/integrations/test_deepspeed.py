"""DeepSpeed jobs with ringattn against one process: its engine, its data loader, its ZeRO stages, nothing mocked.

Gradients may differ by 1e-5 of their norm: everything is fp32, and DeepSpeed reduces in buckets whose order is its own; a
factor of sp, or a rank left out, is 10^4 times that.
"""

import json
from pathlib import Path

import pytest
import torch
from spawn import JITS, torch_extensions, torchrun

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
JOB = Path(__file__).parents[1] / "support" / "deepspeed_job.py"


def job(kind: str, ranks: int, out: Path, *more: str) -> dict[str, object]:
    more_environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": torch_extensions(out.parent)}
    code, _, err = torchrun(str(JOB), kind, str(out), *more, ranks=ranks, timeout=JITS, **more_environment)
    assert code == 0, err
    return json.loads(out.read_text())


@pytest.mark.case(21)
@pytest.mark.timeout(JITS + 10)
@pytest.mark.parametrize(("replicas", "sp"), [(1, 2), (2, 2), (1, 4)])
def test_gradients_and_losses_at_every_stage_are_those_of_one_process(replicas: int, sp: int, tmp_path: Path) -> None:
    actual = job("stages", replicas * sp, tmp_path / "out.json", str(sp))
    assert set(actual) == {"0", "1", "2", "3"}
    for stage, (ratio, off, apart, again) in actual.items():
        assert abs(ratio - 1) < 1e-5, stage
        assert off < 1e-5, stage
        assert apart < 1e-5, stage  # the worst of 20 losses
        assert again == 0, stage  # parameters after loading a checkpoint


@pytest.mark.case(20)
@pytest.mark.timeout(JITS + 10)
def test_packed_and_padded_batches_and_uneven_parts(tmp_path: Path) -> None:
    for case, off in job("batches", 3, tmp_path / "out.json").items():
        assert off < 1e-5, case


@pytest.mark.timeout(JITS + 10)
def test_the_data_loader_of_deepspeed_and_recomputed_layers(tmp_path: Path) -> None:
    for case, off in job("adapter", 3, tmp_path / "out.json").items():
        assert off < 1e-5, case


@pytest.mark.timeout(JITS + 10)
def test_distributed_attention_is_that_of_deepspeed(tmp_path: Path) -> None:
    for case, off in job("layer", 2, tmp_path / "out.json").items():
        assert off < 8 * torch.finfo(torch.float32).eps, case


CURES = [
    "pass position_ids (batch or 1, rows)",
    "pass the same",
    "load the model with 'sdpa'",
    "micro_batch_size=1",
    "ringattn.Mask",
    "leave sp_stream out",
    "on rank 1: batch_dim_idx=0",
    "does not divide",
    "mpu=ringattn.integrations.deepspeed.sequence_parallel",
    "nothing",  # logits and hidden states of this rank's rows are right
    "nothing",
    "LlamaForSequenceClassification returned logits of shape (1, 2)",
    "sp_loss(logits, shift_labels, engine)",
    "returned logits of shape (1, 4, 61)",
    "returned logits of shape (1, 18, 61)",
    "output_router_logits",
    "returned aux_loss of shape ()",
    "nothing",
    "Leave them out and pass mpu=",
]


@pytest.mark.timeout(JITS + 10)
def test_what_would_train_wrongly_is_refused_with_the_cure(tmp_path: Path) -> None:
    for text, hint in zip(job("refusals", 2, tmp_path / "out.json"), CURES, strict=True):
        assert hint in text
