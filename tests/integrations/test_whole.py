"""Results that models take from many rows, sequences shorter than the ranks, positions with gaps: against one process.

Models and tolerance are those of test_transformers: fp64 but for norms and rotary tables, which are fp32.
"""

import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks

pytest.importorskip("transformers")
from test_transformers import CLOSE, LENGTH, batch_of, config_of, model_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.batch import documents_of, padding_of
from ringattn.integrations.transformers.whole_batch import forward_whole
from ringattn.nn import cross_entropy, reduce_gradients
from ringattn.sequence.mask import causal, documents

pytestmark = pytest.mark.slow

IDS = batch_of()["input_ids"]
JUMP = torch.cat([torch.arange(20), torch.arange(1000, 1017)])[None]
HEADS = {
    "rewards": (AutoModelForSequenceClassification, {"labels": torch.tensor([0.3, -0.2], dtype=torch.float64)}),
    "tokens": (AutoModelForTokenClassification, {"labels": IDS % 3}),
    "answers": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([3, 20]), "end_positions": torch.tensor([9, 35])},
    ),
    "own loss": (AutoModelForCausalLM, {"labels": IDS, "num_items_in_batch": torch.tensor(50)}),
    "last logits": (AutoModelForCausalLM, {"logits_to_keep": 4}),
}


def off(model, meant) -> float:
    actual = [(p.grad, m) for p, m in zip(model.parameters(), meant, strict=True) if m is not None]
    return max(((g - m).norm() / m.norm().clamp(min=1e-3)).item() for g, m in actual)


def head(name: str) -> tuple[list[float], str]:
    """How far the loss, the results and the gradients are from those of one process; what a call on this rank's rows says."""
    kind, labels = HEADS[name]
    config = config_of("llama", num_labels=3 if name == "tokens" else 1)
    torch.manual_seed(0)
    model, batch = kind.from_config(config, attn_implementation="eager").double().eval(), {"input_ids": IDS} | labels
    wanted = model(**batch)
    field = "start_logits" if name == "answers" else "logits"
    (wanted.logits.square().mean() if wanted.loss is None else wanted.loss).backward()
    meant = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    got = forward_whole(model, batch, topology="cpu")
    (got.logits.square().mean() if got.loss is None else got.loss).backward()
    reduce_gradients(model.parameters())
    apart = 0.0 if wanted.loss is None else abs(got.loss.item() / wanted.loss.item() - 1)
    results = ((got[field] - wanted[field]).norm() / wanted[field].norm()).item()
    inputs, targets = shard_batch({"input_ids": IDS, "labels": IDS}, config, topology="cpu")
    more = {"own loss": {"labels": targets}, "last logits": {"logits_to_keep": 4}}.get(name, {})
    try:
        model(**inputs, **more)
        answer = ""
    except InputError as error:
        answer = str(error)
    return [apart, results, off(model, meant)], answer


def trained(batch: dict) -> list[float]:
    """How far a Llama's loss and gradients on `batch` are from those of one process."""
    model = model_of("llama")
    total = F.cross_entropy(
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
    )
    total.backward()
    meant = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    inputs, targets = shard_batch(batch, model.config, dtype=torch.float64, topology="cpu")
    loss = cross_entropy(model(**inputs).logits, targets)
    loss.backward()
    reduce_gradients(model.parameters())
    return [abs(loss.item() / total.item() - 1), off(model, meant)]


def compiled(rank: int) -> list[float]:
    """Three steps of a compiled model, of which the last two use the graphs of the first."""
    register()
    config = config_of("llama", tie_word_embeddings=False)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    batch = {"input_ids": IDS, "labels": IDS}
    wanted = model(**batch).loss.item()
    model.set_attn_implementation("ringattn")
    actual, graphs = [], torch.compile(model, backend="eager")
    for again in (False, True, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            loss = forward_whole(graphs, batch, schedule="ring", layout="zigzag").loss
        loss.backward()
        actual.append(abs(loss.item() / wanted - 1))
    return actual


def everything(rank: int) -> dict:
    register()
    short = IDS[:, :2]
    jump = {"input_ids": IDS, "labels": IDS, "position_ids": JUMP, "attention_mask": torch.ones_like(IDS)}
    short_head = HEADS["rewards"][0].from_config(config_of("llama", num_labels=1), attn_implementation="eager").double()
    alone = short_head(input_ids=short).logits.detach()
    short_head.set_attn_implementation("ringattn")
    rewards = forward_whole(short_head, {"input_ids": short}, topology="cpu").logits
    return {name: head(name) for name in HEADS} | {
        "fewer tokens than ranks": trained({"input_ids": short, "labels": short}),
        "rewards of fewer tokens": [(rewards - alone).norm().item()],
        "a gap in positions": trained(jump),
    }


@pytest.mark.timeout(120)
def test_results_of_many_rows_are_those_of_one_process_or_refused() -> None:
    for actual in run_ranks(3, everything, timeout=110):
        for name, value in actual.items():
            numbers, answer = value if isinstance(value, tuple) else (value, None)
            assert all(x < CLOSE for x in numbers), (name, numbers)
            if name != "tokens" and answer is not None:  # token classes are rows: theirs are right on a rank
                assert "forward_whole(model, batch, group)" in answer, name


@pytest.mark.timeout(120)
def test_a_compiled_model_is_compiled_once() -> None:
    for actual in run_ranks(2, compiled, timeout=110):
        assert all(x < CLOSE for x in actual), actual


def test_documents_begin_where_positions_do_not_increase() -> None:
    assert documents_of(JUMP, masked=True) == causal()
    assert documents_of(torch.arange(7, 7 + LENGTH)[None]) == causal()  # starts above 0
    packed = torch.tensor([[4, 5, 6, 0, 1, 8, 8, 9]])
    assert documents_of(packed, masked=True) == documents((0, 3, 6, 8))
    gaps = torch.stack([torch.tensor([0, 1, 5, 6]), torch.tensor([0, 3, 4, 9])])  # differ, but none begins anew
    assert documents_of(gaps, masked=True) == causal()
    with pytest.raises(InputError, match="jump forward by more than 1"):
        documents_of(JUMP)


def test_positions_of_padding_do_not_count() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 1, 7], [3, 4, 9, 10, 11, 0]])
    bias = padding_of(tokens, positions)
    assert bias is not None and torch.equal(bias == 0, tokens.bool())
    positions[0, 5] = 1
    with pytest.raises(InputError, match="either padded or packed"):
        padding_of(tokens, positions)


def test_num_items_is_the_divisor() -> None:
    logits, targets = torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 2, -100, 4, 0, 1]])
    loss = cross_entropy(logits, targets, num_items=torch.tensor(20))
    loss.backward()
    other = logits.detach().clone().requires_grad_()
    wanted = F.cross_entropy(other[0], targets[0], reduction="sum") / 20
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)  # the same sum, but for its order
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-12, atol=0)
    for bad in (-1, True, 2.5, torch.tensor([1, 2])):
        with pytest.raises(InputError, match="num_items"):
            cross_entropy(logits, targets, num_items=bad)
