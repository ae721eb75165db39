"""Vision-language models: the text decoder on shards, towers as ever, against the same models in one process.

Models and tolerance are as in test_transformers: fp64 but for norms and rotary tables, which are fp32.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor

pytest.importorskip("transformers")
from composite_models import FAMILIES, IMAGE, batch_of, model_of
from test_transformers import CLOSE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.gathered import replace_attention
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import cross_entropy, reduce_gradients
from ringattn.planner import make_plan

pytestmark = pytest.mark.slow

PLAIN = dict(topology="cpu", schedule="ring", layout="zigzag")
REFUSED = {"mllama": "cross_attention_states"}


def compared(name: str, kind: str = "plain", averaged: bool = False, recomputed: bool = False) -> list[float] | str:
    """How far loss, logits and gradients are from those of one process; or why the model is refused."""
    model, batch, world = model_of(name), batch_of(name, kind), dist.get_world_size()
    wanted = model(**batch)
    wanted.loss.backward()
    meant = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    if recomputed:
        model.gradient_checkpointing_enable()
        model.train()
    try:
        got = forward_whole(model, batch, averaged_over=world if averaged else 1, **PLAIN)
    except InputError as error:
        return str(error)
    got.loss.backward()
    reduce_gradients(model.parameters())
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    actual = {n: p.grad / world if averaged else p.grad for n, p in model.named_parameters() if n in meant}
    return [
        abs(got.loss.item() / wanted.loss.item() - 1),
        ((got.logits - wanted.logits)[real].norm() / wanted.logits[real].norm()).item(),
        apart(actual, meant),
    ]


def apart(actual: dict[str, Tensor], meant: dict[str, Tensor]) -> float:
    """The worst gradient. Those of keys' biases are 0 but for rounding: softmax does not change with them."""
    least = 1e-2 * max(grad.norm().item() for grad in meant.values())
    return max(((actual[n] - grad).norm() / grad.norm().clamp(min=least)).item() for n, grad in meant.items())


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return "nothing"


def head_on_the_whole() -> list[float]:
    """A few logits, and classes of sequences that hang on images: loss aside, the gradients of a tower."""
    actual = []
    model, batch = model_of("llava"), batch_of("llava") | {"logits_to_keep": 3}
    del batch["labels"]
    classifier = AutoModelForSequenceClassification.from_config(model_of("gemma3", num_labels=2).config).double().eval()
    labelled = batch_of("gemma3") | {"labels": torch.tensor([0, 1])}
    for net, given in ((model, batch), (classifier, labelled)):
        net.set_attn_implementation("eager")
        wanted = net(**given)
        (wanted.logits.square().sum() if wanted.loss is None else wanted.loss).backward()
        meant = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        net.zero_grad(set_to_none=True)
        net.set_attn_implementation("ringattn")
        got = forward_whole(net, given, **PLAIN)
        (got.logits.square().sum() if wanted.loss is None else got.loss).backward()
        reduce_gradients(net.parameters())
        actual.append(((got.logits - wanted.logits).norm() / wanted.logits.norm()).item())
        actual.append(apart({n: p.grad for n, p in net.named_parameters()}, meant))
    return actual


def features() -> list[float]:
    """What vision towers return by themselves, before and after their model has run, and beside a loss."""
    actual = []
    for name in ("gemma3", "qwen2_5_vl"):
        model, batch = model_of(name), batch_of(name)
        images = {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
        wanted = model.get_image_features(**images).last_hidden_state
        model.set_attn_implementation("ringattn")
        for _ in range(2):
            actual.append((model.get_image_features(**images).last_hidden_state - wanted).abs().max().item())
            forward_whole(model, batch, **PLAIN)
    return actual


def merged() -> list[float]:
    """`shard_batch` of embeddings with images in them and positions of three kinds, against one process."""
    model, batch = model_of("qwen2_vl"), batch_of("qwen2_vl", "padded")
    wanted = model(**batch)
    wanted.loss.backward()
    meant = model.lm_head.weight.grad
    model.zero_grad()
    ids, is_image = batch["input_ids"], batch["input_ids"] == IMAGE
    images = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    embeddings = model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], torch.cat(list(images)))
    grids = {k: batch[k] for k in ("image_grid_thw", "mm_token_type_ids", "attention_mask")}
    positions, _ = model.model.get_rope_index(ids, **grids)
    model.set_attn_implementation("ringattn")
    given = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    inputs, targets = shard_batch(given | {"position_ids": positions}, model.config, dtype=torch.float64, **PLAIN)
    loss = cross_entropy(model(**inputs).logits, targets)
    loss.backward()
    reduce_gradients(model.parameters())
    grad = model.lm_head.weight.grad
    return [abs(loss.item() / wanted.loss.item() - 1), ((grad - meant).norm() / meant.norm()).item()]


def refusals() -> list[str]:
    """In the order of `CURES`."""
    model, batch = model_of("gemma3"), batch_of("gemma3")
    model.set_attn_implementation("ringattn")
    text = {"input_ids": batch["input_ids"]}
    inputs, _ = shard_batch(text, model.config, dtype=torch.float64, **PLAIN)
    types = batch["token_type_ids"][:, : inputs["input_ids"].shape[1]]
    again = torch.cat([torch.arange(20), torch.arange(17)]).expand(3, 2, -1)
    pali, prefix = model_of("paligemma of gemma2"), batch_of("paligemma of gemma2")
    pali.set_attn_implementation("ringattn")
    torn = prefix | {"token_type_ids": torch.arange(37).expand(2, -1).remainder(3).clamp(max=1)}
    del prefix["token_type_ids"]
    encoder = AutoConfig.for_model("bert", vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    two_ways = AutoModel.from_config(encoder, attn_implementation="ringattn").double()
    calls = [
        lambda: model(**batch),
        lambda: model.model.language_model(**text),
        lambda: shard_batch(batch, model.config, **PLAIN),
        lambda: model(**inputs, pixel_values=batch["pixel_values"]),
        lambda: model(**inputs, token_type_ids=types),
        lambda: shard_batch(text | {"position_ids": again}, model.config, **PLAIN),
        lambda: shard_batch(text | {"position_ids": again[:2]}, model.config, **PLAIN),
        lambda: forward_whole(pali, prefix, **PLAIN),
        lambda: two_ways(**text),
        lambda: two_ways(**{k: v for k, v in inputs.items() if k != "use_cache"}),
        lambda: forward_whole(pali, torn, **PLAIN),
    ]
    return [refused(call) for call in calls]


CURES = [
    "call model(**inputs) with the inputs of ringattn.integrations.transformers.shard_batch",
    "call model(**inputs) with the inputs of ringattn.integrations.transformers.shard_batch",
    "pixel_values, token_type_ids, from which a model with other towers",
    "stands beside the text decoder",
    "made of one rank's rows: call ringattn.integrations.transformers.forward_whole",
    "as (4, batch, seq_len)",
    "pass (batch, seq_len), or",
    "attention in both directions",
    "needs the whole sequence described",
    "attention in both directions",
    "number the parts differently",
]


def on_two(rank: int) -> dict[str, object]:
    register()
    actual: dict[str, object] = {name: compared(name, averaged=n % 2 == 1) for n, name in enumerate(FAMILIES)}
    actual["logits kept, classes"] = head_on_the_whole()
    actual["features of towers"] = features()
    actual["merged embeddings"] = merged()
    actual["layers recomputed"] = compared("qwen2_5_vl", "padded", recomputed=True)
    return actual


def on_three(rank: int) -> dict[str, object]:
    register()
    actual: dict[str, object] = {name: compared(name, "padded", averaged=True) for name in ("gemma3", "qwen3_vl", "paligemma")}
    actual["refused"] = refusals()
    return actual


@pytest.mark.timeout(200)  # seconds on a quiet machine, a minute and more on a busy one
def test_models_with_images_are_those_of_one_process_or_refused() -> None:
    for actual in run_ranks(2, on_two, timeout=190):
        for name, value in actual.items():
            if name in REFUSED:
                assert REFUSED[name] in value, name
            else:
                assert all(x < CLOSE for x in value), (name, value)


@pytest.mark.timeout(200)
def test_padded_batches_on_three_ranks_and_what_is_refused() -> None:
    for actual in run_ranks(3, on_three, timeout=190):
        for text, hint in zip(actual.pop("refused"), CURES, strict=True):
            assert hint in text
        for name, value in actual.items():
            assert all(x < CLOSE for x in value), (name, value)


def registered(rank: int) -> dict[str, float | str]:
    """How far models are from one process when another's "sdpa" was replaced, and what those that were given get."""
    shape = dict(vocab_size=61, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config, other = (AutoConfig.for_model("llama", hidden_size=size, **shape) for size in (32, 16))
    model, copy, small = (
        AutoModelForCausalLM.from_config(c, attn_implementation="sdpa").double() for c in (config, config, other)
    )
    seeing, two_ways = (
        model_of("llava"),
        AutoModel.from_config(AutoConfig.for_model("bert", hidden_size=36, **shape)).double().eval(),
    )
    seeing.set_attn_implementation("sdpa")
    ids, images = torch.arange(1, 31).view(2, 15), batch_of("llava")
    mask = torch.ones_like(ids).index_fill(1, torch.arange(12, 15), 0)
    calls = {
        "a smaller one": lambda: small(ids).logits,
        "a two-way one, padded": lambda: two_ways(ids, mask).last_hidden_state,
        "another with images": lambda: seeing(**images).logits,
    }
    meant = {name: call() for name, call in calls.items()}
    wanted = {"model": model(ids[:1]).logits, "copy": copy(ids[:1]).logits}
    group = dist.group.WORLD

    def make(*args: object, **kwargs: object) -> object:
        return make_plan(*args, world=2, schedule="ring", topology="cpu", **kwargs)

    replace_attention(small, "sdpa", group, make, (7, None), False, lambda: None)  # another job's: this one's layers pass it
    replace_attention(model, "sdpa", group, make, (1, None), False, lambda: None)
    calls.pop("a smaller one")
    actual: dict[str, float | str] = {name: (call() - meant[name]).abs().max().item() for name, call in calls.items()}
    own = slice(8 * rank, 8 * rank + 8)
    part = {"input_ids": ids[:1, own], "position_ids": torch.arange(15)[None, own], "use_cache": False}
    for name, net in (("model", model), ("copy", copy)):
        actual[f"rows of the {name}"] = (net(**part).logits - wanted[name][:, own]).abs().max().item()
    actual["refused"] = refused(lambda: model(ids[:1, own]))
    actual["as before"] = (copy(ids[:1]).logits - wanted["copy"]).abs().max().item()  # whole, without positions
    return actual


def test_registration_serves_the_model_it_was_given() -> None:
    for actual in run_ranks(2, registered):
        assert "begin at 0 on every rank" in actual.pop("refused")
        assert all(off < CLOSE for off in actual.values()), actual
