"""Faults that were reported of other libraries, tried here: see docs/reports.md, which names where each was reported.

Models and tolerance are those of test_transformers; every case is against one process with the model's own attention.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor, nn

pytest.importorskip("transformers")
import test_routers
from test_transformers import CLOSE, LENGTH, batch_of, config_of, model_of
from test_whole import off
from transformers import AutoModelForCausalLM

from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import cross_entropy, reduce_gradients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RING = dict(schedule="ring", layout="zigzag")
PARTS = dict(schedule="ring", layout="contiguous")  # of 13, 12 and 12 tokens
IDS = batch_of()["input_ids"]
Loss = Callable[[Any], Tensor]


def compare(one_process: Loss, on_ranks: Loss, model: Any, averaged: bool = False) -> dict[str, float]:
    """How far the loss, and the gradients of all parameters, on ranks are from those of one process."""
    wanted = one_process(model)
    wanted.backward()
    meant = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    actual = on_ranks(model)
    actual.backward()
    if not averaged:
        reduce_gradients(model.parameters())
    return {"loss": abs(actual.item() / wanted.item() - 1), "gradients": off(model, meant)}


def own(batch: dict[str, Tensor]) -> Loss:
    return lambda model: model(**batch).loss


def whole(batch: dict[str, Tensor], **how: Any) -> Loss:
    return lambda model: forward_whole(model, batch, **(RING | how)).loss


def documents() -> dict[str, float]:
    lengths = (5, 1, 13, 10, 8)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    batch = {"input_ids": IDS, "position_ids": positions, "labels": IDS.masked_fill(positions == 0, -100)}

    def each_alone(model: Any) -> Tensor:
        parts = IDS.split(lengths, dim=1)
        sums = [model(input_ids=x, labels=x).loss * x[:, 1:].numel() for x in parts if x.shape[1] > 1]
        return sum(sums) / sum(x[:, 1:].numel() for x in parts)

    return compare(each_alone, whole(batch), model_of("llama"))


def ranks_without_targets() -> dict[str, float]:
    batch = {"input_ids": IDS, "labels": IDS.clone()}
    batch["labels"][:, :30] = -100
    return compare(own(batch), whole(batch, **PARTS), model_of("llama"))


def length_that_does_not_divide() -> dict[str, float]:
    batch = {"input_ids": IDS[:, :29], "labels": IDS[:, :29]}
    return compare(own(batch), whole(batch), model_of("llama"))


def balance_per_token() -> dict[str, float]:
    batch = batch_of() | {"num_items_in_batch": torch.tensor(60)}
    return compare(own(batch), whole(batch), test_routers.model_of("mixtral"))


def unequal_micro_batches() -> dict[str, float]:
    few = IDS.clone()
    few[:, :33] = -100
    steps = [{"input_ids": IDS, "labels": x, "num_items_in_batch": torch.tensor(80)} for x in (IDS, few)]

    def both(loss: Callable[[dict], Loss]) -> Loss:
        return lambda model: loss(steps[0])(model) + loss(steps[1])(model)

    return compare(both(own), both(whole), model_of("llama"))


def averaged_gradients() -> dict[str, float]:
    batch, kept = batch_of(), []

    def in_ddp(model: Any) -> Tensor:
        kept.append(nn.parallel.DistributedDataParallel(model))
        return forward_whole(kept[0], batch, averaged_over=dist.get_world_size(), **RING).loss

    return compare(own(batch), in_ddp, model_of("llama"), averaged=True)


def one_key_head() -> dict[str, float]:
    torch.manual_seed(0)
    config = config_of("llama")
    config.num_attention_heads, config.num_key_value_heads = 5, 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    return compare(own(batch_of()), whole(batch_of()), model)


def accuracy() -> dict[str, float]:
    model, batch = model_of("llama"), batch_of("padded right")
    logits = model(**batch).logits
    model.set_attn_implementation("ringattn")
    wanted = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).sum().item()
    inputs, targets = shard_batch(batch, model.config, dtype=torch.float64, **RING)
    hits = (model(**inputs).logits.argmax(-1) == targets).sum()
    dist.all_reduce(hits)
    again = forward_whole(model, batch, **RING).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    return {"rows": abs(hits.item() - wanted), "whole": abs(again.sum().item() - wanted)}


def two_models() -> dict[str, float]:
    """Heads 9 over 3 and 4 over 2, called in turn, backward in the same order."""
    first, second = model_of("llama"), model_of("qwen3")
    batch = batch_of()
    losses = [own(batch)(model) for model in (first, second)]
    sum(losses).backward()
    meant = [[p.grad for p in model.parameters()] for model in (first, second)]
    actual = []
    for model in (first, second):
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation("ringattn")
        actual.append(whole(batch)(model))
    for loss in actual:
        loss.backward()
    for model in (first, second):
        reduce_gradients(model.parameters())
    return {
        "losses": max(abs(a.item() / b.item() - 1) for a, b in zip(actual, losses, strict=True)),
        "gradients": max(off(model, grads) for model, grads in zip((first, second), meant, strict=True)),
    }


def targets_across_the_cut() -> dict[str, float]:
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    batch["labels"][:, [13, 25]] = IDS[:, [13, 25]]  # first tokens of ranks 1 and 2, which the ranks before predict
    return compare(own(batch), whole(batch, **PARTS), model_of("llama"))


def temperature_per_token() -> dict[str, float]:
    source = torch.Generator().manual_seed(2)
    batch = batch_of()
    heat = 0.5 + torch.rand(2, LENGTH, generator=source, dtype=torch.float64)

    def alone(model: Any) -> Tensor:
        logits = (model(input_ids=IDS).logits / heat[..., None])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    def on_rows(model: Any) -> Tensor:
        inputs, targets = shard_batch(batch | {"heat": heat}, model.config, dtype=torch.float64, **RING)
        cut = inputs.pop("heat")
        return cross_entropy(model(**inputs).logits / cut[..., None], targets)

    return compare(alone, on_rows, model_of("llama"))


def preferences() -> dict[str, float]:
    """DPO: one sequence of the batch is chosen, the other, which is padded, rejected."""
    batch = batch_of("padded right")
    labels = batch.pop("labels")[:, 1:]
    reference = torch.tensor([-150.0, -120.0], dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        of_tokens = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        policy = of_tokens.masked_fill(labels == -100, 0.0).sum(1)
        margins = policy - reference
        return -F.logsigmoid(0.1 * (margins[1] - margins[0]))

    return compare(
        lambda model: loss(model(**batch).logits),
        lambda model: loss(forward_whole(model, batch, **RING).logits),
        model_of("llama"),
    )


REPORTS = {
    "axolotl#3608": documents,
    "axolotl#3026": ranks_without_targets,
    "EasyContext#47": length_that_does_not_divide,
    "Megatron-LM#3672": balance_per_token,
    "verl#2857": unequal_micro_batches,
    "DeepSpeed#5248": averaged_gradients,
    "verl#1226": one_key_head,
    "trl#4579": accuracy,
    "DeepSpeed#8291": two_models,
    "LlamaFactory#10475": targets_across_the_cut,
    "verl#5957": temperature_per_token,
    "OpenRLHF#439": preferences,
}


def everything(rank: int) -> dict[str, dict[str, float]]:
    register()
    return {name: report() for name, report in REPORTS.items()}


def test_what_was_reported_of_other_libraries_is_right_here() -> None:
    for actual in run_ranks(3, everything, timeout=110):
        assert set(actual) == set(REPORTS)
        for name, numbers in actual.items():
            assert all(x < CLOSE for x in numbers.values()), (name, numbers)  # NaN is not close either
