"""PEFT on shards against one process: adapters in the layers, layers trained whole, tokens and keys put before the sequence.

Models and tolerance are those of test_transformers. Each run gives gradients as they are summed over ranks, and in DDP.
"""

from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from test_transformers import CLOSE, batch_of, model_of
from test_whole import off

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import cross_entropy, reduce_gradients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=LAYERS, r=4, init_lora_weights=False),
    "trained whole": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}
TOKENS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}
PREFIX = peft.PrefixTuningConfig
RING = dict(schedule="ring", layout="zigzag")


def tuned(kind: str) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(model_of("llama"), (ADAPTERS | TOKENS)[kind]()).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def steps(kind: str, padding: str) -> dict[str, float]:
    """How far losses and gradients are from those of one process, by the way a step is made."""
    model, batch = tuned(kind), batch_of(padding)
    wanted = model(**batch).loss
    wanted.backward()
    meant = [p.grad for p in model.parameters()]
    model.get_base_model().set_attn_implementation("ringattn")
    actual = {}

    def compare(way: str, loss: torch.Tensor) -> None:
        actual[way] = max(abs(loss.item() / wanted.item() - 1), off(model, meant))
        model.zero_grad(set_to_none=True)

    model.zero_grad(set_to_none=True)
    loss = forward_whole(model, batch, **RING).loss
    loss.backward()
    reduce_gradients(model.parameters())
    compare("forward_whole", loss)
    if kind in ADAPTERS:
        inputs, targets = shard_batch(batch, model.config, dtype=torch.float64, **RING)
        loss = cross_entropy(model(**inputs).logits, targets)
        loss.backward()
        reduce_gradients(model.parameters())
        compare("shard_batch", loss)
    averaged = nn.parallel.DistributedDataParallel(model)
    loss = forward_whole(averaged, batch, averaged_over=2, **RING).loss
    loss.backward()
    compare("DDP", loss)
    return actual


def refusals() -> list[str]:
    prompts = tuned("prompt tuning")
    prefix = peft.get_peft_model(model_of("llama"), PREFIX(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    answers = []
    for model in (prompts, prefix):
        model.get_base_model().set_attn_implementation("ringattn")
    inputs, _ = shard_batch(batch_of(), prompts.config, dtype=torch.float64, **RING)
    for call in (
        lambda: prompts(**inputs),
        lambda: prefix(**inputs),
        lambda: forward_whole(prefix, batch_of("padded right"), **RING),
    ):
        try:
            call()
            answers.append("nothing")
        except InputError as error:
            answers.append(str(error))
    return answers


def everything(rank: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    register()
    actual = {kind: steps(kind, "plain") for kind in ADAPTERS | TOKENS}
    return actual | {f"{kind}, padded": steps(kind, "padded right") for kind in ("LoRA", *TOKENS)}, refusals()


def test_tuned_models_are_those_of_one_process_or_refused() -> None:
    for actual, answers in run_ranks(2, everything, timeout=110):
        for kind, ways in actual.items():
            assert all(x < CLOSE for x in ways.values()), (kind, ways)  # NaN is not close either
        prompts, prefix, whole = answers
        assert "given inputs_embeds of" in prompts and "forward_whole(model, batch, group)" in prompts
        assert "past_key_values" in prefix and "LoRA" in prefix
        assert "past_key_values" in whole and "LoRA" in whole
