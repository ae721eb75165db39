"""Vision-language models: the text decoder on shards, towers as ever, against the same models in one process.

Models and tolerance are as in test_transformers: fp64 but for norms and rotary tables, which are fp32.
"""

import pytest
import torch
from spawn import run_ranks

pytest.importorskip("transformers")
from composite_models import FAMILIES, batch_of, model_of
from test_transformers import CLOSE

from ringattn import InputError
from ringattn.integrations.transformers import register
from ringattn.integrations.whole import forward_whole
from ringattn.nn import reduce_gradients

PLAIN = dict(topology="cpu", schedule="ring", layout="zigzag")


def compared(name: str, kind: str, world: int, averaged: bool) -> list[float] | str:
    """How far loss, logits and gradients are from those of one process; or why the model is refused."""
    model, batch = model_of(name), batch_of(name, kind)
    wanted = model(**batch)
    wanted.loss.backward()
    meant = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("ringattn")
    try:
        got = forward_whole(model, batch, averaged_over=world if averaged else 1, **PLAIN)
    except InputError as error:
        print("REFUSED", error, flush=True)
        return str(error)
    got.loss.backward()
    reduce_gradients(model.parameters())
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    off = {}
    for n, p in model.named_parameters():
        if meant[n] is not None:
            grad = p.grad / world if averaged else p.grad
            off[n] = ((grad - meant[n]).norm() / meant[n].norm().clamp(min=1e-3)).item()
    return [
        abs(got.loss.item() / wanted.loss.item() - 1),
        ((got.logits - wanted.logits)[real].norm() / wanted.logits[real].norm()).item(),
        max(off.values()),
    ]


def families(rank: int, world: int, cases: list[tuple[str, str]]) -> dict[str, list[float] | str]:
    register()
    return {f"{name}, {kind}": compared(name, kind, world, n % 2 == 1) for n, (name, kind) in enumerate(cases)}
