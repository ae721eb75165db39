"""Encoder-decoder models on shards against the same models in one process, with their own eager attention.

Everything is in fp64, but T5's norms, and rotary tables and the eager softmax of T5Gemma, are computed in fp32: a difference in
the last bit of fp64 may become one of fp32, and 6 units of its rounding were seen in a gradient of T5Gemma. 16 are allowed; a
bucket of the relative position bias that is off by one distance is 10^4 of them.
"""

import copy

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PretrainedConfig

from ringattn import InputError, make_plan
from ringattn.execution.sharding import resident_positions
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.seq2seq.decoder_inputs import with_decoder_inputs
from ringattn.integrations.transformers.seq2seq.relative_bias import consecutive_buckets, plans_for, relative_attention
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import cross_entropy, reduce_gradients
from ringattn.sequence.mask import END, Band

pytestmark = pytest.mark.slow

SOURCE, TARGET = 29, 23
CLOSE = 16 * torch.finfo(torch.float32).eps
T5 = dict(
    d_model=24,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    eos_token_id=1,
)
BART = dict(
    d_model=24,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=3,
    decoder_attention_heads=3,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
GEMMA = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    attn_logit_softcapping=5.0,
    sliding_window=9,  # more than is padded: a row that sees nothing is NaN in eager attention
    layer_types=["sliding_attention", "full_attention"],
    dropout_rate=0.0,
    attention_dropout=0.0,
    pad_token_id=0,
)
CONFIGS = {
    "t5": T5,  # a table in the first layer of a stack
    "umt5": T5 | dict(feed_forward_proj="gated-gelu"),  # a table in each layer
    "bart": BART,  # learned positions
    "m2m_100": BART,  # positions that leave padding out
    "mbart": BART,  # labels shifted round
    "pegasus": BART,  # sinusoidal positions
    "t5gemma": dict(encoder=GEMMA, decoder=GEMMA, decoder_start_token_id=2),  # windows both ways, softcap, GQA
    "longt5": T5 | dict(local_radius=4),
    "switch_transformers": T5 | dict(num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "mvp": BART,
    "whisper": {name: value for name, value in BART.items() if name != "max_position_embeddings"},
}


def config_of(name: str, **more: object) -> PretrainedConfig:
    return AutoConfig.for_model(name, vocab_size=97, pad_token_id=0, **copy.deepcopy(CONFIGS[name]) | more)


def model_of(name: str, kind=AutoModelForSeq2SeqLM, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind.from_config(config_of(name, **more), attn_implementation="eager").double().eval()
    for parameter in model.parameters():  # their own initialisation leaves biases and norms without effect
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(padded: str = "", source: int = SOURCE, target: int = TARGET) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 97, (2, n), generator=random) for n in (source, target))
    batch = {"input_ids": ids, "labels": labels}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, slice(0, 7) if padded == "left" else slice(source - 7, source)] = 0
        labels[1, -5:] = -100
        batch |= {"attention_mask": mask, "input_ids": ids * mask}
    return batch


def gradients(model: torch.nn.Module) -> list[Tensor | None]:
    actual = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return actual


def apart(actual: list[Tensor | None], meant: list[Tensor | None]) -> float:
    """The worst gradient's distance, relative to its norm."""
    pairs = [(a, b) for a, b in zip(actual, meant, strict=True) if b is not None]
    return max(((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in pairs)


def alone(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one process."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def on_rows(name: str, batch: dict[str, Tensor], layout: str, group=None, reentrant: bool | None = None) -> list[float]:
    """How far loss and gradients on this rank's rows are from those of one process. reentrant: recompute layers, that way."""
    model = model_of(name)
    meant, of_parameters = alone(model, batch)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
    model.set_attn_implementation("ringattn")
    inputs, targets = shard_batch(batch, model.config, group, layout=layout, schedule="ring", dtype=torch.float64)
    loss = cross_entropy(model(**inputs).logits, targets, group)
    loss.backward()
    reduce_gradients(model.parameters(), group)
    return [abs(loss.item() / meant.item() - 1), apart(gradients(model), of_parameters)]


def whole(name: str, batch: dict[str, Tensor], group, kind=AutoModelForSeq2SeqLM, **more: object) -> list[float]:
    """The same for `forward_whole`, and how far its results are."""
    model = model_of(name, kind, **more)
    meant = model(**batch, use_cache=False)
    meant.loss.backward()
    of_parameters = gradients(model)
    model.set_attn_implementation("ringattn")
    got = forward_whole(model, batch, group, schedule="ring", layout="contiguous")
    got.loss.backward()
    reduce_gradients(model.parameters(), group)
    results = [(got[field] - meant[field]).norm().item() for field in ("logits", "encoder_last_hidden_state")]
    return [abs(got.loss.item() / meant.loss.item() - 1), apart(gradients(model), of_parameters), *results]


def biased(causal: bool, world: int, rank: int, group=None) -> list[float]:
    """Attention with a relative bias, its gradients and that of its table, against the dense form."""
    torch.manual_seed(2)
    length, heads = 41, 3
    q, k, v, weight = (torch.randn(2, length, heads, 8, dtype=torch.float64) for _ in range(4))
    table = torch.randn(5, heads, dtype=torch.float64)
    counts = [length - 10, 6, 3, 1] + ([] if causal else [2, length - 3])  # distances from 1 - length on
    indices = [4, 2, 1, 0] + ([] if causal else [3, 2])  # one index on both sides
    hidden = torch.zeros(2, length, dtype=torch.float64)
    hidden[0, -9:] = -torch.inf
    distance = torch.arange(length) - torch.arange(length)[:, None]
    index = torch.tensor(indices).repeat_interleave(torch.tensor(counts))
    index = torch.cat([index, index.new_zeros(2 * length - 1 - len(index))])[distance + length - 1]

    def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        logits = 0.5 * torch.einsum("bqhd,bkhd->bhqk", q, k) + table[index].permute(2, 0, 1) + hidden[:, None, None]
        logits = logits.masked_fill(distance > 0, -torch.inf) if causal else logits
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)

    given = [x.clone().requires_grad_() for x in (q, k, v, table)]
    meant = dense(*given)
    (meant * weight).sum().backward()
    layout = "zigzag" if causal else "striped"
    shape = dict(world=world, heads=heads, head_dim=8, dtype="float64", schedule="ring", layout=layout)
    plans = plans_for(consecutive_buckets(indices, counts, 1 - length), lambda mask: make_plan(length, mask=mask, **shape))
    rows = resident_positions(plans[0].plan.layout, rank)
    own = [x[:, rows].clone().requires_grad_() for x in (q, k, v)] + [table.clone().requires_grad_()]
    out = relative_attention(*own, plans, key_bias=hidden[:, rows], scale=0.5, group=group)
    (out * weight[:, rows]).sum().backward()
    torch.distributed.all_reduce(own[3].grad, group=group)
    of_inputs = [(a.grad - b.grad[:, rows]).norm().item() for a, b in zip(own[:3], given, strict=False)]
    return [(out - meant[:, rows]).norm().item(), *of_inputs, (own[3].grad - given[3].grad).norm().item()]


def refused(group) -> dict[str, str]:
    """By call what this rank is told."""
    batch, raised = batch_of(), {}
    t5, bart = (model_of(name) for name in ("t5", "bart"))
    for model in (t5, bart):
        model.set_attn_implementation("ringattn")
    dropout, dropping = model_of("t5", dropout_rate=0.1), model_of("bart", encoder_layerdrop=0.5)

    how = dict(layout="contiguous", schedule="ring", dtype=torch.float64)

    def run(model, batch=batch):
        model.set_attn_implementation("ringattn")
        return model(**shard_batch(batch, model.config, group, **how)[0])

    packed = {"position_ids": torch.cat([torch.arange(9), torch.arange(20)]).expand(2, -1)}
    mask = torch.ones(2, 1, SOURCE, SOURCE)
    local = shard_batch(batch_of("left"), t5.config, group, **how)[0]
    calls = {
        "own attention": lambda: run(model_of("mvp")),
        "local attention": lambda: run(model_of("longt5")),
        "capacity": lambda: run(model_of("switch_transformers")),
        "sounds": lambda: shard_batch(
            {"input_features": torch.zeros(2, 80, 50), "labels": batch["labels"]}, config_of("whisper"), group
        ),
        "attention dropout": lambda: run(dropout.train()),
        "layers left out": lambda: run(dropping.train()),
        "no decoder inputs": lambda: run(bart, {"input_ids": batch["input_ids"]}),
        "encoder outputs": lambda: run(t5, batch | {"encoder_outputs": (torch.zeros(2, SOURCE, 24),)}),
        "packed": lambda: run(t5, batch | packed),
        "dense mask": lambda: run(t5, batch | {"attention_mask": mask}),
        "another length": lambda: run(t5, batch | {"decoder_attention_mask": torch.ones(2, TARGET + 1)}),
        "padding unsaid": lambda: t5(**local | {"attention_mask": local["attention_mask"].index_fill(1, torch.tensor(0), 0)}),
        "generate": lambda: t5.generate(batch["input_ids"], max_new_tokens=2),
        "pooled": lambda: run(model_of("bart", AutoModelForSequenceClassification), with_decoder_inputs(batch, bart.config)),
    }
    for name, call in calls.items():
        with pytest.raises(InputError) as error:
            call()
        raised[name] = str(error.value)
    return raised


CURES = {
    "own attention": "self attention of MvpEncoder did not come to ringattn",
    "local attention": "self attention of LongT5Stack did not come to ringattn",
    "capacity": "limited capacity",
    "sounds": "encoders of sounds and images",
    "attention dropout": "dropout_rate",
    "layers left out": "config.encoder_layerdrop",
    "no decoder inputs": "put them into the batch",
    "encoder outputs": "leave it out, and pass the encoder's input_ids",
    "packed": "leave them out, and pass padding as attention_mask",
    "dense mask": "which says what is padding",
    "another length": "the decoder's sequence (2, 23)",
    "padding unsaid": "give it to shard_batch",
    "generate": 'set_attn_implementation("sdpa")',
    "pooled": "forward_whole",
}


def everything(rank: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    register()
    pair = torch.distributed.new_group([0, 1])
    actual = {name: on_rows(name, batch_of("left"), "zigzag") for name in ("t5", "umt5", "bart", "m2m_100", "t5gemma")}
    actual["t5, recomputed"] = on_rows("t5", batch_of("right"), "zigzag", reentrant=True)
    actual |= {f"{name}, short": on_rows(name, batch_of(source=2, target=1), "zigzag") for name in ("t5", "bart")}
    actual["relative bias, causal"] = biased(True, 3, rank)
    if rank == 2:
        return actual, {}
    actual |= {f"{name} on two": on_rows(name, batch_of(), "contiguous", pair) for name in ("t5", "bart")}
    actual["t5 on two, recomputed"] = on_rows("t5", batch_of("right"), "contiguous", pair, reentrant=False)
    actual |= {f"{name}, whole": whole(name, batch_of("right"), pair) for name in ("t5", "m2m_100")}
    classes = batch_of() | {"labels": torch.tensor([2, 0])}
    classes["input_ids"][:, -1] = 2  # the end of a sequence, whose state is classified
    actual["bart, classes"] = whole("bart", classes, pair, AutoModelForSequenceClassification, num_labels=3)
    actual["relative bias both ways"] = biased(False, 2, rank, pair)
    return actual, refused(pair)


@pytest.mark.timeout(180)
def test_encoder_decoders_are_those_of_one_process_or_refused() -> None:
    """On three ranks and on two of them, in one job: most of its time is spent on importing transformers."""
    for actual, raised in run_ranks(3, everything, timeout=150):
        assert not {case: off for case, off in actual.items() if not all(x < CLOSE for x in off)}  # NaN is not close either
        for case, text in raised.items():
            assert CURES[case] in text, (case, text)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "pegasus", "m2m_100", "t5gemma"])
def test_decoder_inputs_are_those_that_the_model_makes_of_whole_labels(name: str) -> None:
    model, labels = model_of(name), batch_of("left")["labels"]
    given = []
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True)
    model(input_ids=batch_of()["input_ids"], labels=labels)
    assert torch.equal(with_decoder_inputs({"labels": labels}, model.config)["decoder_input_ids"], given[0])


def test_what_a_mask_function_keeps_is_found_by_evaluating_it() -> None:
    from transformers import masking_utils as masks

    from ringattn.integrations.transformers.layers import MaskInfo
    from ringattn.integrations.transformers.seq2seq.stacks import distance_band

    assert distance_band(MaskInfo(None, function=masks.causal_mask_function)) == Band(right=0)
    assert distance_band(MaskInfo(None, function=masks.bidirectional_mask_function)) == Band()
    assert distance_band(MaskInfo(5, function=masks.sliding_window_causal_mask_function(5))) == Band(-4, 0)
    assert distance_band(MaskInfo(5, function=masks.sliding_window_bidirectional_mask_function(5))) == Band(-5, 5)
    assert distance_band(MaskInfo(None, function=lambda b, h, q, k: k >= q)) == Band(0, END)
    with pytest.raises(InputError, match="no run of distances"):
        distance_band(MaskInfo(None, function=lambda b, h, q, k: (k - q) % 2 == 0))
