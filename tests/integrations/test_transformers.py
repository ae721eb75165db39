"""Models of transformers on shards against the same models in one process, with their own eager attention.

Everything is in fp64, but their norms and rotary tables are computed in fp32, so that a difference in the last bit of fp64 may
become one of fp32: up to 3.6 units of fp32's rounding were seen in a gradient, on one rank as on three. 8 are allowed; a window
that is wrong by one is 10^4 of them or more.
"""

import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.nn import cross_entropy, reduce_gradients, shift_labels

pytestmark = pytest.mark.slow

LENGTH = 37
CLOSE = 8 * torch.finfo(torch.float32).eps
SMALL = dict(vocab_size=97, hidden_size=72, intermediate_size=64, num_hidden_layers=2, head_dim=16, max_position_embeddings=64)
WINDOWED = SMALL | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "llama": SMALL | dict(num_attention_heads=9, num_key_value_heads=3),
    "qwen3": SMALL | dict(num_attention_heads=4, num_key_value_heads=2),
    "mistral": SMALL | dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=8),
    "gemma2": WINDOWED
    | dict(num_attention_heads=3, num_key_value_heads=1, attn_logit_softcapping=5.0, query_pre_attn_scalar=9),
    "gemma3_text": WINDOWED | dict(num_attention_heads=4, num_key_value_heads=2),
    "gpt_oss": WINDOWED | dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2),
    "smollm3": SMALL | dict(num_attention_heads=6, num_key_value_heads=2),
}


def config_of(name: str, **more: object) -> PretrainedConfig:
    return AutoConfig.for_model(name, **MODELS[name], pad_token_id=0, attention_dropout=0.0, **more)


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of(name), attn_implementation="eager", experts_implementation="eager"
    ).double()
    for parameter in model.parameters():  # their own initialisation leaves sinks, norms and logits without effect
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(kind: str = "plain") -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (2, LENGTH), generator=source)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (5, 20, 12)]).expand(2, -1)
    if kind.startswith("padded"):
        padding = torch.zeros(2, LENGTH, dtype=torch.bool)
        padding[0, slice(0, 9) if kind.endswith("left") else slice(LENGTH - 9, LENGTH)] = True
        batch["attention_mask"] = (~padding).long()
        batch["labels"] = ids.masked_fill(padding, -100)
        if kind.endswith("left"):
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def meaning(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of one process, each sequence by itself and without its padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n in range(len(batch["input_ids"])):
        tokens = batch["attention_mask"][n].bool() if "attention_mask" in batch else torch.ones(LENGTH, dtype=torch.bool)
        sequence = {key: value[n][tokens][None] for key, value in batch.items() if key != "attention_mask"}
        targets = shift_labels(sequence.pop("labels")).flatten()
        total = total + F.cross_entropy(model(**sequence, use_cache=False).logits[0], targets, reduction="sum")
        count += int((targets != -100).sum())
    return total / count


CASES = [(name, "plain") for name in MODELS] + [
    (name, kind) for name in ("llama", "gemma2") for kind in ("packed", "padded left", "padded right")
]


def compared(rank: int, world: int, layout: str, checkpoint: bool) -> dict[str, tuple[float, float]]:
    """By case how far the loss and the worst gradient are from those of one process."""
    register()
    actual = {}
    for name, kind in CASES:
        model, batch = model_of(name), batch_of(kind)
        wanted = meaning(model, batch)
        wanted.backward()
        meant = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        if checkpoint:
            model.gradient_checkpointing_enable()
            model.train()
        model.set_attn_implementation("ringattn")
        # By name: what auto chooses is the planner's tests' to judge, and here is planned anew for every model and mask.
        inputs, targets = shard_batch(batch, model.config, schedule="token_ring", layout=layout, dtype=torch.float64)
        loss = cross_entropy(model(**inputs).logits, targets)
        loss.backward()
        reduce_gradients(model.parameters())
        off = max(
            ((p.grad - m).norm() / m.norm().clamp(min=1e-3)).item() for p, m in zip(model.parameters(), meant, strict=True)
        )
        actual[f"{name}, {kind}"] = abs(loss.item() / wanted.item() - 1), off
    return actual


@pytest.mark.case(20)
@pytest.mark.parametrize(
    ("world", "layout", "checkpoint"), [(1, "contiguous", False), (3, "zigzag", True), (4, "contiguous", False)]
)
def test_losses_and_gradients_are_those_of_one_process(world: int, layout: str, checkpoint: bool) -> None:
    for actual in run_ranks(world, compared, world, layout, checkpoint, timeout=170):
        assert set(actual) == {f"{name}, {kind}" for name, kind in CASES}
        worst = {case: off for case, off in actual.items() if not all(x < CLOSE for x in off)}  # NaN is not close either
        assert not worst


def stretched(kind: str) -> PretrainedConfig:
    """Rotary tables that are made anew beyond 16 positions."""
    config = config_of("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return config


def by_kind(kind: str) -> PretrainedConfig:
    """The same for one kind of layer only, as Gemma 3 has it."""
    config = config_of("gemma3_text")
    config.rope_parameters = {"full_attention": stretched(kind).rope_parameters, "sliding_attention": {"rope_type": "default"}}
    return config


def refused(rank: int, world: int) -> list[str]:
    """What each rank is told, in the order of `CURES`."""
    register()
    model, batch = model_of("llama"), batch_of()
    model.set_attn_implementation("ringattn")
    ids = batch["input_ids"]
    inputs, _ = shard_batch(batch, model.config)
    dense = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    packed = batch_of("packed")["position_ids"].clone()
    packed[1] = torch.arange(LENGTH)
    padded = batch_of("padded left")
    jumping = padded | {"position_ids": batch_of("packed")["position_ids"]}
    dropout = model_of("llama").train()
    dropout.set_attn_implementation("ringattn")
    dropout.model.layers[0].self_attn.attention_dropout = 0.1
    calls = [
        lambda: model(ids),
        lambda: model.generate(ids[:, :5], max_new_tokens=2),
        lambda: model(**inputs, attention_mask=torch.tensor([[0] + [1] * (inputs["input_ids"].shape[1] - 1)] * 2)),
        lambda: model(**inputs, attention_mask=dense),
        lambda: dropout(**inputs),
        lambda: shard_batch({"input_ids": ids, "attention_mask": dense}, model.config),
        lambda: shard_batch({"input_ids": ids, "position_ids": packed}, model.config),
        lambda: shard_batch(jumping, model.config),
        lambda: shard_batch({"input_ids": ids, "pixel_values": torch.zeros(2, 3, 4, 4)}, model.config),
        lambda: shard_batch({"labels": ids}, model.config),
        lambda: shard_batch(batch | {"use_cache": True}, model.config),
        lambda: shard_batch(batch, config_of("llama", is_causal=False)),
        lambda: shard_batch(batch, config_of("gpt_oss", output_router_logits=True)),
        lambda: shard_batch(batch, AutoConfig.for_model("opt", layerdrop=0.1)),
        lambda: shard_batch(batch, AutoConfig.for_model("qwen3_next")),
        lambda: shard_batch(batch, AutoConfig.for_model("mamba")),
        lambda: shard_batch(batch, stretched("dynamic")),
        lambda: shard_batch(batch, by_kind("dynamic")),
        lambda: shard_batch(batch, model.config, schedule="bucket brigade"),
        lambda: shard_batch({"input_ids": ids[0]} if rank else batch, model.config),  # of one rank only
    ]
    raised = []
    for call in calls if world > 1 else calls[:-1]:
        with pytest.raises(InputError) as error:
            call()
        raised.append(str(error.value))
    return raised


CURES = [
    "model(**inputs) with the inputs of",
    'set_attn_implementation("sdpa")',
    "give it to shard_batch",
    "by shard_batch",
    "set config.attention_dropout = 0",
    "pass (batch, seq_len), which says what is padding",
    "put one sequence into each batch",
    "leave the padding out of a packed batch",
    "leave pixel_values out",
    "neither input_ids nor inputs_embeds",
    "leave them out",
    "both directions",
    "set config.output_router_logits = False",
    "config.layerdrop=0.1 leaves layers out at random",
    "linear_attention",
    "no attention heads",
    "use 'yarn'",
    "use 'yarn'",
    "bucket brigade",
    "pass (batch, seq_len)",
]


@pytest.mark.case(20)
@pytest.mark.parametrize("world", [1, 2])
def test_what_shards_cannot_do_is_refused_with_what_to_do_instead(world: int) -> None:
    for raised in run_ranks(world, refused, world):
        for text, hint in zip(raised, CURES if world > 1 else CURES[:-1], strict=True):
            assert hint in text


def in_bfloat16(rank: int) -> list[float]:
    """The errors, to fp32, of logits under autocast: on shards and in one process."""
    register()
    model, batch = model_of("llama").float(), batch_of()
    ids = batch["input_ids"]
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        alone = model(ids, use_cache=False).logits
        model.set_attn_implementation("ringattn")
        inputs, _ = shard_batch(batch, model.config, dtype=torch.bfloat16)
        own = model(**inputs).logits
    rows = inputs["position_ids"][0]
    return [((actual.float() - exact[:, rows]).norm() / exact[:, rows].norm()).item() for actual in (own, alone[:, rows])]


def test_under_autocast_attention_is_in_its_dtype() -> None:
    """Everything around attention is the same, so the error may be 1.5 times that of one process, as for attention alone."""
    for own, alone in run_ranks(2, in_bfloat16):
        assert 0 < own < 1.5 * alone


@pytest.mark.parametrize(("name", "kind"), [("llama", "padded left"), ("gemma2", "packed")])
def test_a_compiled_model_is_one_graph(name: str, kind: str) -> None:
    """Plans are made with the batch, so that the compiler meets no planner, in which it would break the graph."""
    torch._dynamo.reset()
    register()
    model = model_of(name)
    model.set_attn_implementation("ringattn")
    inputs, _ = shard_batch(batch_of(kind), model.config, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
