"""Load-balancing losses of mixture-of-experts models through `forward_whole`, against one process with eager attention.

Tolerance is that of test_transformers. A loss over one rank's tokens is off by percents. Routers decide by comparison, so that
a rounding may send a token elsewhere; with these seeds none does.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor

pytest.importorskip("transformers")
from test_transformers import CLOSE, batch_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import reduce_gradients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SHAPE = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
SMALL = SHAPE | dict(intermediate_size=32, num_key_value_heads=2)
EXPERTS = SMALL | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": SMALL | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=24),
    "qwen3_moe": EXPERTS | dict(head_dim=16),
    "olmoe": EXPERTS,
    "gpt_oss": SMALL | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8),
    "jetmoe": SHAPE
    | dict(num_key_value_heads=2, kv_channels=12, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": SMALL | dict(num_local_experts=4, num_experts_per_tok=2),
    "phimoe": SMALL | dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0, input_jitter_noise=0.0),
}


def config_of(name: str) -> Any:
    asked = dict(pad_token_id=0, output_router_logits=True, router_aux_loss_coef=0.5, aux_loss_coef=0.5, attention_dropout=0.0)
    return AutoConfig.for_model(name, **MODELS[name], **asked)


def model_of(name: str, kind: Any = AutoModelForCausalLM, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind.from_config(config_of(name), attn_implementation="eager", experts_implementation="eager", **more).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def padded(kind: str) -> dict[str, Tensor]:
    """The first token behind padding on the left is no target: padding would predict it."""
    batch = batch_of(kind)
    if kind.endswith("left"):
        first = batch["attention_mask"].argmax(1)
        batch["labels"][torch.arange(2), first] = -100
    return batch


def off(actual: Tensor, wanted: Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm().clamp(min=1e-3)).item()


def apart(
    name: str, batch: dict[str, Tensor], averaged_over: int = 1, checkpoint: bool = False, group: Any = None
) -> dict[str, float]:
    model = model_of(name)
    if name != "gpt_oss":  # eager attention of others makes NaN, in fp64, of rows that see padding alone
        model.set_attn_implementation("sdpa")
    wanted = model(**batch)
    wanted.loss.backward()
    meant = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    if checkpoint:
        model.gradient_checkpointing_enable()
        model.train()
    actual = forward_whole(model, batch, group, averaged_over=averaged_over, schedule="ring", layout="zigzag")
    actual.loss.backward()
    reduce_gradients(model.parameters(), group)
    grads = [p.grad / averaged_over for p in model.parameters()]
    results = {field: off(actual[field], wanted[field]) for field in ("loss", "aux_loss")}
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()  # what padding becomes is nobody's concern
    routers = [
        off(a[tokens.flatten()], b[tokens.flatten()]) for a, b in zip(actual.router_logits, wanted.router_logits, strict=True)
    ]
    return results | {
        "logits": off(actual.logits[tokens], wanted.logits[tokens]),
        "router_logits": max(routers),
        "gradients": max(off(g, m) for g, m in zip(grads, meant, strict=True) if m is not None),
    }


def rewards() -> dict[str, float]:
    """A head on the whole sequence, whose decoder returns router logits that nothing reads."""
    model, batch = model_of("mixtral", AutoModelForSequenceClassification), {"input_ids": padded("plain")["input_ids"]}
    wanted = model(**batch).logits
    model.set_attn_implementation("ringattn")
    return {"logits": off(forward_whole(model, batch, schedule="ring", layout="zigzag").logits, wanted)}


class AddsOfItsRows(torch.nn.Module):
    """Stands for a model that adds to its loss in place what it makes of the rows it has."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> torch.nn.Module:
        return self.inner

    def forward(self, **kwargs: Any) -> Any:
        outputs = self.inner(**kwargs)
        if outputs.loss is not None:
            outputs.loss += outputs.logits.square().mean()
        return outputs


def added_in_place() -> dict[str, float]:
    model, batch = AddsOfItsRows(model_of("mixtral")), padded("plain") | {"output_router_logits": False}
    wanted = model(**batch).loss
    model.inner.set_attn_implementation("ringattn")
    return {"loss": off(forward_whole(model, batch, schedule="ring", layout="zigzag").loss, wanted)}


def refusals() -> list[str]:
    plain, cures = padded("plain"), []
    asked, model = config_of("mixtral"), model_of("mixtral")
    silent = config_of("mixtral")
    silent.output_router_logits = False
    inputs, _ = shard_batch(plain | {"output_router_logits": False}, asked, schedule="ring", layout="zigzag")
    model.set_attn_implementation("ringattn")
    for call in (
        lambda: shard_batch(plain, asked),
        lambda: shard_batch(plain | {"output_router_logits": True}, silent),
        lambda: model(**inputs | {"output_router_logits": True}),  # behind its back
    ):
        try:
            call()
            cures.append("nothing")
        except InputError as error:
            cures.append(str(error))
    return cures


def everything(rank: int, world: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    register()
    short = {key: value[:, :2] for key, value in padded("plain").items()}
    actual = {name: apart(name, padded("plain")) for name in MODELS} | {
        "gpt_oss, padded right": apart("gpt_oss", padded("padded right")),
        "mixtral, padded left, gradients averaged": apart("mixtral", padded("padded left"), averaged_over=world),
        "recomputed": apart("mixtral", padded("plain"), checkpoint=True),
        "fewer tokens than ranks": apart("mixtral", short, averaged_over=world),
        "rewards": rewards(),
        "added in place": added_in_place(),
    }
    pair = dist.new_group([0, 1])
    if rank < 2:
        actual["two ranks"] = apart("qwen3_moe", padded("padded left"), averaged_over=2, group=pair)
    return actual, refusals()


def test_load_balancing_losses_are_those_of_one_process() -> None:
    for actual, answers in run_ranks(3, everything, 3, timeout=110):
        for case, numbers in actual.items():
            assert all(x < CLOSE for x in numbers.values()), (case, numbers)  # NaN is not close either
        assert all("forward_whole(model, batch, group)" in answer for answer in answers), answers
