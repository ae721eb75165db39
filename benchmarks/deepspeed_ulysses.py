"""DeepSpeed's own Ulysses and ringattn in one job: the same model, the same batches, the same engine settings, taking turns.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/deepspeed_ulysses.py

Prints how far the losses are apart, and per training step the median seconds (of the slowest rank) and the bytes over
the loopback interface, gradients included, which are the same for both. On
one machine, CPU, gloo; nothing else should run beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ringattn.integrations.deepspeed import register_with_transformers, sp_loss

PASSED = Path("/sys/class/net/lo/statistics/rx_bytes")
OURS = "ringattn_here"


@dataclass
class Flags:
    """What to train."""

    seq_len: int = 4096
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 256
    layers: int = 2
    stage: int = 1
    rounds: int = 7


def main(flags: Flags) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    AttentionInterface.register(OURS, sdpa_attention_forward)
    AttentionMaskInterface.register(OURS, sdpa_mask)
    UlyssesSPAttentionHF.register_with_transformers(model_of(flags, "sdpa"), "sdpa", world, 1)
    mpu = register_with_transformers(model_of(flags, OURS), OURS, world, 1)
    engines = {name: engine_of(flags, kind, mpu) for name, kind in (("Ulysses", "sdpa"), ("ringattn", OURS))}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    moved: dict[str, list[int]] = {name: [] for name in engines}
    for step in range(flags.rounds + 1):
        batch = batch_of(flags, step, world, rank)
        for name in list(engines)[:: 1 if step % 2 else -1]:
            loss, took, count = timed(engines[name], batch)
            losses[name].append(loss)
            if step:  # the first makes plans and connections
                seconds[name].append(took)
                moved[name].append(count)
    if rank == 0:
        apart = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
        print(f"{world} ranks, {flags}: losses of {flags.rounds + 1} steps at most {apart:.1e} apart")
        for name in engines:
            print(f"{name:>9}: {median(seconds[name]):.3f} s, {median(moved[name]) / 1e6:.1f} MB per step")
        ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
        print(
            f"Ulysses / ringattn, median of {len(ratios)} pairs: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    dist.barrier()
    dist.destroy_process_group()


def model_of(flags: Flags, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=flags.hidden,
        intermediate_size=2 * flags.hidden,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.heads,
        num_key_value_heads=flags.kv_heads,
    )
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


def engine_of(flags: Flags, attention: str, mpu: Any) -> Any:
    model = model_of(flags, attention)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": flags.stage},
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def batch_of(flags: Flags, step: int, world: int, rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (1, flags.seq_len), generator=torch.Generator().manual_seed(step))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    whole = {"input_ids": ids, "position_ids": torch.arange(flags.seq_len)[None], "shift_labels": targets}
    return {name: x.chunk(world, dim=1)[rank] for name, x in whole.items()}


def timed(engine: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float, int]:
    """Loss, seconds of the slowest rank, bytes over loopback of one training step."""
    inputs = {name: x.clone() for name, x in batch.items() if name != "shift_labels"}
    dist.barrier()
    before, begin = int(PASSED.read_text()), time.perf_counter()
    loss = sp_loss(engine(**inputs, use_cache=False).logits, batch["shift_labels"], engine)
    engine.backward(loss)
    engine.step()
    took = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return loss.item(), took.item(), int(PASSED.read_text()) - before


if __name__ == "__main__":
    main(tyro.cli(Flags))
