"""Tests that models which mix rows outside ringattn, or count positions on each rank, are detected by a run and refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM

from ringattn import InputError
from ringattn.integrations.transformers.attention_interface import register, shard_batch
from ringattn.integrations.transformers.support.trial import TRIED

SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)


def model_of(name: str = "llama", attention: str = "ringattn", **more: object) -> Any:
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, pad_token_id=0, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def run(model: Any, batch: dict[str, Tensor] | None = None, **more: Any) -> Tensor:
    whole = {"input_ids": torch.arange(12)[None] + 1} | (batch or {})
    inputs, _ = shard_batch(whole, model.config, schedule="ring", layout="contiguous", **more)
    logits: Tensor = model(**inputs).logits
    return logits


class Shift(nn.Module):
    """Adds what the row before has, times a weight that is zero so far, as RWKV-like blocks and short convolutions do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([x[:, :1] * 0, x[:, :-1]], dim=1)
        return self.inner(x) + self.weight * before  # type: ignore[no-any-return]


class Mean(nn.Module):
    """Takes the mean of a rank's rows off: it needs no order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(dim=1, keepdim=True))  # type: ignore[no-any-return]


class OwnAttention(nn.Module):
    """A layer that does not ask for the attention interface, and projects to zero."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        nn.init.zeros_(inner.o_proj.weight)

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
        q, k, v = (p(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2) for p in self.projections())
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.inner.o_proj(out.transpose(1, 2).flatten(2)), None

    def projections(self) -> tuple[nn.Module, ...]:
        return self.inner.q_proj, self.inner.k_proj, self.inner.v_proj


def local_positions(model: Any) -> None:
    tables = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: tables(x, torch.arange(x.shape[1])[None])


def shift_in_the_last_layer(model: Any) -> None:
    model.model.layers[1].mlp = Shift(model.model.layers[1].mlp)


def shift_in_the_first_layer(model: Any) -> None:
    model.model.layers[0].mlp = Shift(model.model.layers[0].mlp)


def mean_of_rows(model: Any) -> None:
    model.model.layers[0].mlp = Mean(model.model.layers[0].mlp)


class Normed(nn.Module):
    """Normalises over a rank's rows in training, and by running statistics in eval mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


def batch_norm(model: Any) -> None:
    model.train().model.layers[0].mlp = Normed(model.model.layers[0].mlp)


def own_attention(model: Any) -> None:
    model.model.layers[0].self_attn = OwnAttention(model.model.layers[0].self_attn)


def raises(model: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise IndexError("index 3 is out of bounds")

    model.model.layers[0].mlp.forward = forward


DAMAGES: list[tuple[Callable[[Any], None], str]] = [
    (local_positions, "the query of attention 1 (LlamaAttention) of LlamaForCausalLM depends on which other rows are present"),
    (shift_in_the_first_layer, "reached others before attention 2"),
    (shift_in_the_last_layer, "reached logits of others after the last attention"),
    (mean_of_rows, "reached others before attention 2"),
    (batch_norm, "BatchNorm1d of LlamaForCausalLM takes the mean of this rank's rows in training"),
    (own_attention, "rows mix outside ringattn"),
    (raises, "does not run on some rows of a sequence (IndexError: index 3"),
    (lambda model: model.set_attn_implementation("sdpa"), "no attention of LlamaForCausalLM came to ringattn"),
]


def refusals(rank: int, world: int) -> list[str]:
    actual = []
    for damage, _ in DAMAGES:
        model = model_of()
        damage(model)
        with pytest.raises(InputError) as raised:
            run(model)
        actual.append(str(raised.value))
    return actual


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_meet_outside_attention_are_refused_on_every_rank(world: int) -> None:
    for actual in run_ranks(world, refusals, world):
        for text, (_, expected) in zip(actual, DAMAGES, strict=True):
            assert expected in text, text


@pytest.mark.parametrize(("name", "more"), [("llama", {}), ("mixtral", MOE), ("gpt_neox", {}), ("opt", {"ffn_dim": 32})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_rows_alone_pass_and_are_not_disturbed(name: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(name, **more).to(dtype).train()
    modes, states = [module.training for module in model.modules()], []
    for _ in range(2):  # tried in the first
        torch.manual_seed(1)
        run(model, dtype=dtype)
        states.append(torch.get_rng_state())
    assert vars(model)[TRIED] and modes == [module.training for module in model.modules()]
    assert torch.equal(*states), "random numbers go on as if nothing had been tried"
    assert not any(module._forward_hooks for module in model.modules())


def counted(model: Any, **more: Any) -> int:
    """How many passes the model makes for one call."""
    calls = 0

    def count(*given: object) -> None:
        nonlocal calls
        calls += 1

    hook = model.get_input_embeddings().register_forward_hook(count)
    run(model, **more)
    hook.remove()
    return calls


def test_a_model_is_tried_once_for_each_kind_of_batch() -> None:
    model, anew = model_of(), {"position_ids": torch.arange(12)[None] % 7}
    assert counted(model) == 5, "two for rows, two for positions, and the batch"
    assert counted(model) == counted(model, batch={"position_ids": torch.arange(12)[None]}) == 1
    assert counted(model, batch={"attention_mask": torch.arange(12)[None] > 2}) == 3
    assert [counted(model, batch=anew) for _ in range(2)] == [2, 1]


def test_gradients_under_autocast_are_there_in_the_first_call() -> None:
    model = model_of(attention_dropout=0.0)
    grads = []
    for _ in range(2):  # tried in the first
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            run(model, dtype=torch.bfloat16).float().square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    first, second = grads
    assert all(a is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Merging(nn.Linear):
    """Changes its weight when it is told to evaluate, as adapters do that merge."""

    def train(self, mode: bool = True) -> "Merging":
        if not mode:
            self.weight.data.zero_()
        return super().train(mode)


def test_modes_are_changed_without_what_a_module_does_about_them() -> None:
    model = model_of()
    head = model.lm_head = Merging(32, 97, bias=False)
    run(model)
    assert head.weight.abs().sum() > 0 and head.training


OWN_POSITIONS: list[tuple[str, dict[str, Any], dict[str, Tensor], str]] = [
    (
        "roberta",
        {"is_decoder": True},
        {},
        "RobertaForCausalLM does not count positions 0, 1, 2, ... where it gets none",
    ),
    ("opt", {"ffn_dim": 32}, {"attention_mask": torch.arange(12)[None] > 2}, "and the left is padded"),
    ("gpt_oss", MOE | {"head_dim": 8}, {"position_ids": torch.arange(12)[None] % 7}, "documents_apart=True"),
]


@pytest.mark.parametrize(("name", "more", "batch", "text"), OWN_POSITIONS, ids=[case[0] for case in OWN_POSITIONS])
def test_positions_that_a_model_takes_otherwise_are_refused(name: str, more: Any, batch: Any, text: str) -> None:
    model = model_of(name, **more).eval()
    with pytest.raises(InputError) as raised:
        run(model, batch=batch)
    assert text in str(raised.value)
    positions = torch.arange(12)[None] + (2 if name == "roberta" else 0)
    cured = {"documents_apart": True} if name == "gpt_oss" else {"batch": batch | {"position_ids": positions}}
    run(model, **{"batch": batch} | cured)


def test_models_that_count_and_tell_documents_apart_pass() -> None:
    padded, packed = {"attention_mask": torch.arange(12)[None] > 2}, {"position_ids": torch.arange(12)[None] % 7}
    for name in ("llama", "mistral", "gemma2"):
        for batch in ({}, padded, packed):
            run(model_of(name, head_dim=8), batch=batch)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "mpt", "codegen"])
def test_models_with_attention_of_their_own_are_refused_when_they_are_made(name: str) -> None:
    register()
    with pytest.raises(InputError, match="do not use transformers' attention interface"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name), attn_implementation="ringattn")


@pytest.mark.slow
def test_a_compiled_model_is_tried_while_it_is_traced() -> None:
    model = model_of()
    with torch.no_grad():
        expected = run(model)
        del model.__dict__[TRIED]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close = torch.allclose(run(compiled), expected, atol=1e-6)  # of logits near 0.1, in fp32
    assert close and {kind for kind, _ in vars(model)[TRIED]} == {"rows", "counted"}
    damaged = model_of()
    shift_in_the_first_layer(damaged)
    with pytest.raises(InputError, match="reached others before attention 2"):
        run(torch.compile(damaged, backend="eager"))
