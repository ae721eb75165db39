"""Trains with DeepSpeed ZeRO 2, two replicas of two ranks each.

torchrun --standalone --nproc-per-node 4 docs/examples/ds_train.py
"""

import deepspeed
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ringattn.integrations.deepspeed import register_with_transformers, sp_loss

deepspeed.init_distributed()
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama",
    vocab_size=256,
    hidden_size=72,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=9,  # not divisible by 2 or 4: no trouble
    num_key_value_heads=3,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
mpu = register_with_transformers(model, "sdpa", sequence_parallel_size=2, micro_batch_size=1)
engine, *_ = deepspeed.initialize(
    model=model,
    mpu=mpu,  # never mesh_param
    optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
    config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}},
)

text = torch.arange(512).remainder(251)[None]  # this replica's; or what UlyssesSPDataLoaderAdapter gives
whole = {"input_ids": text, "position_ids": torch.arange(512)[None], "shift_labels": F.pad(text[:, 1:], (0, 1), value=-100)}
size, rank = mpu.get_sequence_parallel_world_size(), mpu.get_sequence_parallel_rank()
for step in range(5):
    batch = {name: x.tensor_split(size, dim=1)[rank].to(engine.device) for name, x in whole.items()}
    targets = batch.pop("shift_labels")
    loss = sp_loss(engine(**batch, use_cache=False).logits, targets, engine)  # the exact mean over all ranks
    engine.backward(loss)
    engine.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
