"""The sweep over model types in short: a dozen that stand for all, on 2 ranks, and that the sweep notices what is wrong.

`benchmarks/conform.py` is the whole sweep; docs/conformance.md its tables.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("tyro")
import conform
import torch.nn.functional as F
from conformance import ranks, report
from conformance.corrections import NOT_BUILT, VARIANTS
from conformance.models import all_models
from conformance.tiny import VOCABULARY, tiny_config
from torch import Tensor

from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.layers import attend

pytestmark = pytest.mark.slow

# Of each make one: plain, learned positions, one norm for two branches, windows and capped logits, routed experts, latent keys
# and values, attention's results taken as views; encoder-decoders with and without a relative bias.
EXACT = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "deepseek_v3", "jetmoe", "t5", "bart")
REFUSED = ("mamba", "bert, both ways", "bloom", "falcon")  # a state along the sequence, both ways, attention of their own
EITHER = ("opt",)  # positions of its own where a mask is given
CASES = ("plain", "packed", "padded left", "recomputed")
SEQ2SEQ = ("t5", "bart")


def swept(tmp_path: Path, models: list[tuple[str, str]], **more: Any) -> dict[tuple[str, str], str]:
    """(type, case) to what came out on 2 ranks: the kind, and what was said."""
    out = tmp_path / "results.jsonl"
    conform.sweep(out, models, ranks.Job((2,), **more))
    return {(line["type"], line["case"]): f"{line['kind']} {line['text']}".strip() for line in report.lines(out)}


@pytest.mark.timeout(120)
def test_model_types_are_exact_or_refused(tmp_path: Path) -> None:
    models = [("seq2seq" if name in SEQ2SEQ else "causal", name) for name in EXACT + REFUSED + EITHER]
    actual = swept(tmp_path, models, cases=CASES)
    assert not {case: message for case, message in actual.items() if message.startswith("third")}
    tried = {
        case: message for case, message in actual.items() if not message.startswith("none")
    }  # JetMoE knows no recomputation
    wrong = {case: message for case, message in tried.items() if case[0] in EXACT and message != "exact"}
    assert not wrong
    assert all(message.startswith("refused") for (name, _), message in actual.items() if name in REFUSED)
    assert {name for name, _ in actual} == {*EXACT, *REFUSED, *EITHER}
    assert set(report.markdown(report.lines(tmp_path / "results.jsonl")).split()) >= {"llama", "mamba"}


class Local:
    """Attention of a rank's rows among themselves, whatever the model is told; when the model is tried, as it should be."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def get_interface(self, implementation: str, default: Any) -> Any:
        return self.attend if implementation == "ringattn" else self.own.get_interface(implementation, default)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **rest: Any) -> tuple[Tensor, None]:
        if not isinstance(rest["ringattn"], Shards):
            return attend(module, q, k, v, *args, **rest)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), None


def wrong_models(rank: int, job: ranks.Job, models: list[tuple[str, str]]) -> None:
    """The job of `conform.sweep`, in which two makes are broken: one attends to its own rows, one fails on one rank only."""
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.llama import modeling_llama

    own = modeling_gpt2.GPT2Attention.forward

    def raising(self: Any, *args: Any, **more: Any) -> Any:
        if isinstance(more.get("ringattn"), Shards):
            raise KeyError("ringattn")
        return own(self, *args, **more)

    modeling_llama.ALL_ATTENTION_FUNCTIONS = Local(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    if rank == 1:
        modeling_gpt2.GPT2Attention.forward = raising
    ranks.run(rank, job, models)


@pytest.mark.timeout(120)
def test_the_sweep_notices_what_is_neither(tmp_path: Path) -> None:
    models = [("causal", "llama"), ("causal", "gpt2"), ("causal", "qwen2")]
    actual = swept(tmp_path, models, cases=("plain",), patience=3, run=wrong_models)
    assert actual["llama", "plain"].startswith("third loss off by")
    assert actual["gpt2", "plain"].startswith("third")
    assert actual["qwen2", "plain"] == "exact"  # behind a case in which ranks fell out of step


MOST = {"num_hidden_layers": 5, "hidden_size": 64, "vocab_size": VOCABULARY}


def test_every_type_has_a_tiny_configuration() -> None:
    """A type that a new version of transformers brings shows here if the rules do not reach it."""
    large = {}
    for task, name in all_models():
        if name not in NOT_BUILT and name not in VARIANTS:
            config = tiny_config(name, task == "causal").get_text_config(decoder=True)
            sizes = [getattr(config, size, most) for size, most in MOST.items()]
            if any(size > most for size, most in zip(sizes, MOST.values(), strict=True)):
                large[name] = sizes
    assert not large


def line(name: str, case: str, kind: str, world: int = 2, text: str = "") -> dict[str, Any]:
    return {"task": "causal", "type": name, "class": name.title(), "case": case, "kind": kind, "world": world, "text": text} | {
        "loss_error": 1e-15,
        "grad_error": 2e-14,
    }


def test_tables() -> None:
    results = [line("llama", "plain", "exact"), line("llama", "packed", "exact"), line("opt", "plain", "exact")]
    results += [line("opt", "packed", "refused", text="no | documents"), line("mamba", "plain", "refused", text="a state")]
    results += [
        line("falcon", "plain", "exact", 1),
        line("falcon", "plain", "third", 2, "loss off"),
        line("x", "all", "none", 0),
    ]
    table = report.markdown(results)
    assert "| causal | 1 | 1 | 1 | 1 | 1 |" in table
    assert "| llama | Llama | exact |  | exact |  |  |  |  | 2e-14 |" in table
    assert "| opt | Opt | exact |  | refused |  |  |  |  | no \\| documents |" in table
    assert "| mamba | Mamba | a state |" in table
    assert "| falcon | Falcon | third |  |  |  |  |  |  | loss off |" in table
