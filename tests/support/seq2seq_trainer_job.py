"""Seq2SeqTrainer on T5 for test_seq2seq_trainer: what it logs, evaluates and predicts, as one line of JSON.

python tests/support/seq2seq_trainer_job.py FILE                one process, transformers' own attention
torchrun ... tests/support/seq2seq_trainer_job.py FILE          each pair of sequences on two ranks
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from ringattn import InputError
from ringattn.integrations.trainer import SequenceParallel

SOURCE = TARGET = 21  # alike, so that nothing is told apart by its length


class Ring(SequenceParallel, Seq2SeqTrainer):
    pass


def model() -> Any:
    torch.manual_seed(0)
    shape = dict(vocab_size=61, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0)
    buckets = dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
    config = AutoConfig.for_model("t5", **shape, **buckets, pad_token_id=0, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").double()


def sequences(decoder_inputs: bool) -> list[dict[str, Any]]:
    """Sources without padding, then with it; targets of 20, 5, 20 and 2 tokens."""
    text = torch.randint(1, 61, (8, SOURCE + TARGET), generator=torch.Generator().manual_seed(0))
    actual = []
    for n, row in enumerate(text):
        mask = (torch.arange(SOURCE) < SOURCE - 3 * (n % 3)).long()
        labels = row[SOURCE:].clone()
        labels[(20, 5, 20, 2)[n % 4] :] = -100
        item = {"input_ids": row[:SOURCE] * mask, "attention_mask": mask, "labels": labels}
        if decoder_inputs:
            item["decoder_input_ids"] = torch.cat([torch.zeros(1, dtype=torch.int64), row[SOURCE:-1]])
        actual.append(item)
    return actual


def metrics(actual: Any) -> dict[str, float]:
    """The order of sequences counts."""
    logits, encoded = actual.predictions
    weights = np.arange(1, 1 + len(logits))[:, None, None]
    return {"logits": float((logits * weights).sum()), "encoded": float((encoded * weights).sum()), "count": len(logits)}


def outcome(size: int, **more: Any) -> dict[str, list[float]]:
    given = dict(learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2)
    given |= dict(logging_steps=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    arguments = Seq2SeqTrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=2, **(given | more))
    data = sequences("label_smoothing_factor" in more)
    parallel = dict(sequence_parallel_size=size, sharding={"schedule": "ring", "layout": "zigzag"}) if size > 1 else {}
    kind = Ring if size > 1 else Seq2SeqTrainer
    trainer = kind(model(), arguments, train_dataset=data, eval_dataset=data[:3], compute_metrics=metrics, **parallel)
    trainer.train()
    logged = [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]
    evaluated = trainer.evaluate()
    return {"logged": logged, "evaluated": [evaluated[f"eval_{name}"] for name in ("loss", "logits", "encoded", "count")]}


def generating() -> str:
    """What `predict_with_generate` is told, which does not run on shards."""
    arguments = Seq2SeqTrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True, predict_with_generate=True)
    try:
        Ring(model(), arguments, sequence_parallel_size=2).predict(sequences(False)[:1])
    except InputError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    size = Seq2SeqTrainingArguments(tempfile.mkdtemp(), use_cpu=True).world_size
    answer: dict[str, Any] = {"plain": outcome(size), "smoothed": outcome(size, label_smoothing_factor=0.3)}
    if size > 1:
        answer["generating"] = generating()
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(answer))
