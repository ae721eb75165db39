"""Trainers of several kinds for test_trainer_loss: what each logs, evaluates and predicts, as one line of JSON.

python tests/support/trainer_loss_job.py FILE                one process, transformers' own attention
torchrun ... tests/support/trainer_loss_job.py FILE          each sequence on two ranks
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from ringattn import InputError
from ringattn.integrations.trainer import SequenceParallel

LENGTH = 37
SHAPE = dict(
    vocab_size=61, hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3
)


class Ten(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return (10 * loss[0], loss[1]) if isinstance(loss, tuple) else 10 * loss


class Ring(SequenceParallel, Trainer):
    pass


class RingOfTen(SequenceParallel, Ten):
    pass


class TenOfRing(Ring):
    """A loss of one's own, above the mixin: it calls the model itself."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = of_logits(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class TenOfPlain(Trainer):
    compute_loss = TenOfRing.compute_loss


def of_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).double()
    return 2 * F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def without_count(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return of_logits(outputs, labels, 20)


def experts() -> Any:
    """Its loss has a part for balance, which is of all tokens of a batch; padding left out."""
    torch.manual_seed(0)
    sizes = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5)
    config = AutoConfig.for_model("mixtral", **SHAPE, **sizes, sliding_window=None)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager").double()


def low_rank() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")).double()


def prompts() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).double()


class OfLogits(Trainer):
    """A loss that reads more than the model's own, also where only losses are wanted of evaluation."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + 0.01 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class RingOfLogits(SequenceParallel, OfLogits):
    pass


def flattened(features: list[dict]) -> dict:
    """Documents of different lengths in one sequence, with position_ids and the arguments of flash attention."""
    cut = [{name: x[: LENGTH - 7 * n].tolist() for name, x in item.items()} for n, item in enumerate(features)]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(cut)


KINDS: dict[str, tuple[type, type, dict, dict]] = {
    "plain": (Trainer, Ring, {}, {}),
    "a class below": (Ten, RingOfTen, {}, {}),
    "a class above": (TenOfPlain, TenOfRing, {}, {}),
    "label smoothing": (Trainer, Ring, {"label_smoothing_factor": 0.5}, {}),
    "compute_loss_func": (Trainer, Ring, {}, {"compute_loss_func": of_logits}),
    "compute_loss_func without the count": (Trainer, Ring, {}, {"compute_loss_func": without_count}),
    "logits beside the loss": (OfLogits, RingOfLogits, {"prediction_loss_only": True}, {}),
    "load-balancing loss": (Trainer, Ring, {"prediction_loss_only": True}, {"model": experts}),
    "recomputed layers": (Trainer, Ring, {"gradient_checkpointing": True, "eval_accumulation_steps": 1}, {}),
    "flattened documents": (
        Trainer,
        Ring,
        {"per_device_train_batch_size": 2, "prediction_loss_only": True},
        {"data_collator": flattened},
    ),
    "tokens of one device": (Trainer, Ring, {"average_tokens_across_devices": False}, {}),
}
if importlib.util.find_spec("peft"):
    KINDS |= {
        "LoRA": (Trainer, Ring, {}, {"model": low_rank}),
        "prompt tuning": (Trainer, Ring, {"prediction_loss_only": True}, {"model": prompts}),
    }


def sequences() -> list[dict]:
    """36, 5, 36 and 2 targets in turn."""
    text = torch.randint(0, 61, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = text.clone()
    for n, row in enumerate(labels):
        row[: LENGTH - (36, 5, 36, 2)[n % 4]] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(text, labels, strict=True)]


def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()


def metrics(actual: Any) -> dict[str, float]:
    """The order of sequences counts."""
    weights = np.arange(1, 1 + len(actual.predictions))[:, None, None]
    return {
        "hits": float((actual.predictions.argmax(-1)[:, :-1] == actual.label_ids[:, 1:]).mean()),
        "sum": float((actual.predictions * weights).sum()),
        "inputs": float((actual.inputs * weights[:, 0]).sum()),
        "count": len(actual.predictions),
    }


def asked(kind: Any = TrainingArguments, **more: Any) -> TrainingArguments:
    given = dict(learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2)
    given |= dict(logging_steps=1, gradient_accumulation_steps=4, train_sampling_strategy="sequential")
    given |= dict(per_device_train_batch_size=1, per_device_eval_batch_size=2, include_for_metrics=["inputs"])
    return kind(tempfile.mkdtemp(), include_num_input_tokens_seen=True, **(given | more))


def outcome(kind: str, size: int) -> dict[str, list[float]]:
    plain, ring, arguments, more = KINDS[kind]
    options = {name: value for name, value in more.items() if name != "model"}
    if size > 1:
        options["sequence_parallel_size"] = size
    given = dict(train_dataset=sequences(), eval_dataset=sequences()[:3])
    if "prediction_loss_only" not in arguments:
        given["compute_metrics"] = metrics
    trainer = (ring if size > 1 else plain)(more.get("model", model)(), asked(**arguments), **given, **options)
    trainer.train()
    logged = [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]
    evaluated = trainer.evaluate()
    counted = [trainer.state.num_input_tokens_seen, trainer.state.total_flos]
    if "prediction_loss_only" in arguments:
        return {"logged": logged, "evaluated": [evaluated["eval_loss"]], "counted": counted}
    predicted = trainer.predict([{"input_ids": item["input_ids"]} for item in sequences()[:3]]).predictions
    return {
        "logged": logged,
        "evaluated": [evaluated[f"eval_{name}"] for name in ("loss", "hits", "sum", "inputs", "count")],
        "predicted": [float(predicted.sum()), *predicted.shape],
        "counted": counted,
    }


def refused() -> list[str]:
    answers = []
    for arguments in (
        asked(neftune_noise_alpha=5.0),
        asked(eval_use_gather_object=True),
        asked(Seq2SeqTrainingArguments, predict_with_generate=True),
    ):
        try:
            Ring(model(), arguments, train_dataset=sequences(), sequence_parallel_size=2)
        except InputError as error:
            answers.append(str(error))
    return answers


if __name__ == "__main__":
    size = asked().world_size
    answer: dict[str, Any] = {kind: outcome(kind, size) for kind in KINDS}
    if size > 1:
        answer["refused"] = refused()
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(answer))
