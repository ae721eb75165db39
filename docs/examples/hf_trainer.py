"""Trains with Hugging Face Trainer, two replicas of two ranks each.

torchrun --standalone --nproc-per-node 4 docs/examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from ringattn.integrations.trainer import SequenceParallel


class LongTrainer(SequenceParallel, Trainer):
    """Whatever else a trainer of one's own does."""


torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama",
    vocab_size=256,
    hidden_size=72,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=9,  # not divisible by 2: no trouble
    num_key_value_heads=3,
)
text = torch.randint(0, 256, (16, 512))
dataset = [{"input_ids": row, "labels": row} for row in text]
trainer = LongTrainer(
    AutoModelForCausalLM.from_config(config),
    TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        prediction_loss_only=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=dataset,
    eval_dataset=dataset[:4],
    sequence_parallel_size=2,  # 4 ranks: 2 replicas, each sequence on 2 ranks
)
trainer.train()
loss = trainer.evaluate()["eval_loss"]  # every rank takes part
if trainer.is_world_process_zero():
    print(f"evaluation loss {loss:.4f}")
