"""Trainer with sequences cut over ranks against plain Trainer in one process: DDP, FSDP2, resume, refusals."""

import json
from pathlib import Path

import pytest
import torch
from spawn import finish, start, torchrun

pytest.importorskip("accelerate")

JOB = str(Path(__file__).parents[1] / "support" / "trainer_job.py")
# Parameters are fp64, the model's norms and rotary tables fp32: a few of its roundings. A gradient off by a factor hides behind
# AdamW, but not behind Trainer's clipping of its norm; a mean of means would stand out in the losses.
CLOSE = 8 * torch.finfo(torch.float32).eps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def answer(folder: Path) -> dict:
    return json.loads((folder / "answer.json").read_text())


def same(actual: dict, wanted: dict) -> None:
    a, b = (torch.tensor(x["parameters"], dtype=torch.float64) for x in (actual, wanted))
    assert (a - b).norm() < CLOSE * b.norm()
    count = len(actual["losses"])
    assert count and actual["losses"] == pytest.approx(wanted["losses"][-count:], rel=CLOSE)
    assert actual["eval"] == pytest.approx(wanted["eval"], rel=CLOSE)
    assert actual["batch"] == wanted["batch"] == 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("plain")
    code, _, err = finish(start([JOB, "plain", str(folder)]), timeout=90)
    assert code == 0, err
    return answer(folder)


def job(*arguments: str) -> None:
    code, _, err = torchrun(JOB, *arguments, ranks=4, timeout=90)
    assert code == 0, err


def test_ddp_trains_as_one_process_and_resumes(plain: dict, tmp_path: Path) -> None:
    """Rank 0 saves at step 3, which must not part the plans of the ranks after it."""
    (tmp_path / "again").mkdir()
    job("ddp", str(tmp_path))
    same(answer(tmp_path), plain)
    job("ddp", str(tmp_path / "again"), str(tmp_path / "checkpoint-3"))
    assert len(answer(tmp_path / "again")["losses"]) == 3
    same(answer(tmp_path / "again"), plain)


def test_fsdp_trains_as_one_process(plain: dict, tmp_path: Path) -> None:
    job("fsdp", str(tmp_path))
    same(answer(tmp_path), plain)


def test_a_sequence_is_dealt_to_its_ranks_alike_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    job("dealt", str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    given = [rank["given"] for rank in ranks]
    assert given[0] == given[1] and given[2] == given[3]
    assert len({str(row) for row in given[0] + given[2]}) == 32 == len(given[0]) + len(given[2])
    for rank in ranks:
        divide, dispatch, labels, split, bloom = rank["refused"]
        assert "sequence_parallel_size=3 does not divide the 4 ranks" in divide
        assert "dispatch_batches" in dispatch and "pass a dataset with a length" in dispatch
        assert "the batch has no labels" in labels and "data collator" in labels
        assert "leave both out of accelerator_config" in split
        assert "the layers of BloomForCausalLM do not use transformers' attention interface" in bloom
