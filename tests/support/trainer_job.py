"""A Trainer job for test_trainer: trains as the flags say and prints, as one line of JSON, what came of it.

python tests/support/trainer_job.py plain FOLDER                        one process, transformers' own attention
torchrun ... tests/support/trainer_job.py ddp|fsdp FOLDER [CHECKPOINT]  two replicas, each sequence on two ranks
torchrun ... tests/support/trainer_job.py dealt FOLDER                  what each rank is given of a stream, and what is refused
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ringattn import InputError
from ringattn.integrations.trainer import SequenceParallel

STEPS, LENGTH, SEQUENCES = 6, 37, 32


class Ring(SequenceParallel, Trainer):
    pass


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sequences())


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **rest):
        self.losses += [logs["loss"]] if "loss" in logs else []


def sequences() -> list[dict]:
    """Some with labels that do not count, as many in each sequence, since Trainer's plain mean weighs them otherwise."""
    text = torch.randint(0, 61, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = text.clone()
    labels[:, :5] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(text, labels, strict=True)]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=36, intermediate_size=48, num_hidden_layers=2)
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=9, num_key_value_heads=3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()


def arguments(folder: str, **more) -> TrainingArguments:
    same = dict(learning_rate=1e-2, prediction_loss_only=True, report_to="none", use_cpu=True, disable_tqdm=True)
    return TrainingArguments(
        folder, per_device_train_batch_size=1, per_device_eval_batch_size=2, max_steps=STEPS, logging_steps=1, **same, **more
    )


def main(kind: str, folder: str, resume: str = "") -> None:
    replicas, more = (1, {}) if kind == "plain" else (2, {"ddp_find_unused_parameters": False})
    if kind == "fsdp":
        more = dict(fsdp="full_shard", fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    asked = arguments(folder, gradient_accumulation_steps=4 // replicas, save_steps=3, **more)
    losses = Losses()
    given = dict(train_dataset=sequences(), eval_dataset=sequences()[:8], callbacks=[losses])
    own = Trainer(model(), asked, **given) if kind == "plain" else Ring(model(), asked, **given, sequence_parallel_size=2)
    own.train(resume_from_checkpoint=resume or None)
    actual = own.evaluate()["eval_loss"]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in own.model.parameters()]
    parameters = torch.cat([p.detach().flatten() for p in whole]).double().tolist()
    if asked.process_index == 0:
        batch = own.get_total_train_batch_size(asked)
        answer = {"losses": losses.losses, "eval": actual, "parameters": parameters, "batch": batch}
        Path(folder, "answer.json").write_text(json.dumps(answer))


def dealt(folder: str) -> None:
    """Writes FOLDER/RANK.json: the first tokens of the sequences this rank is given, and errors for what cannot be done."""
    stream = arguments(folder, accelerator_config={"dispatch_batches": False})
    ring = Ring(model(), stream, train_dataset=Stream(), sequence_parallel_size=2)
    given = [batch["input_ids"][0].tolist() for batch in ring.get_train_dataloader()]
    refused = []
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    for tried, asked, data, size in (
        (model(), stream, sequences(), 3),
        (model(), arguments(folder), Stream(), 2),
        (model(), stream, [{"input_ids": item["input_ids"]} for item in sequences()], 2),
        (model(), arguments(folder, accelerator_config={"split_batches": True}), sequences(), 2),
        (bloom, arguments(folder), sequences(), 2),
    ):
        try:
            Ring(tried, asked, train_dataset=data, sequence_parallel_size=size).train()
        except InputError as error:
            refused.append(str(error))
    Path(folder, f"{stream.process_index}.json").write_text(json.dumps({"given": given, "refused": refused}))


if __name__ == "__main__":
    dealt(sys.argv[2]) if sys.argv[1] == "dealt" else main(*sys.argv[1:])
