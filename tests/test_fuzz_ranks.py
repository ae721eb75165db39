"""Bad values on one of three ranks, or on all: every rank raises the same, nobody waits, and the next call is right."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile import VALUES
from spawn import run_ranks

from ringattn import InputError, MismatchError, RingAttnError, attention, causal, make_plan, shard, unshard
from ringattn.nn import Decoder, DecoderConfig, cross_entropy, reduce_gradients, shift_labels

pytestmark = pytest.mark.slow

CASES = 150
WORLD = 3
PLAN = make_plan(13, world=WORLD, heads=2, kv_heads=1, head_dim=4, mask=causal(), schedule="token_ring")
CONFIG = DecoderConfig(vocab_size=17, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden_dim=8)
OTHER = make_plan(13, world=2, heads=2, kv_heads=1, head_dim=4, schedule="ring")
LONGER = make_plan(14, world=WORLD, heads=2, kv_heads=1, head_dim=4, schedule="ring")
BAD = VALUES | {"plan for two": OTHER, "plan for more": LONGER, "token": torch.full((1, 5), 99)}


def calls(rank: int) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each with arguments that are fine on this rank."""
    torch.manual_seed(0)
    q, k, v = (shard(torch.randn(1, 13, heads, 4), PLAN, rank=rank) for heads in (2, 1, 1))
    tokens = torch.arange(13)[None]
    own, targets = (shard(x, PLAN, rank=rank) for x in (tokens, shift_labels(tokens)))
    model = Decoder(CONFIG)
    options = dict(key_bias=None, scale=0.5, sinks=None, softcap=None, return_lse=False, check_finite=False, strict=None)
    parameters = [torch.ones(3, requires_grad=True)]
    parameters[0].grad = torch.full((3,), float(rank))
    return {
        "attention": (attention, dict(q=q, k=k, v=v, plan=PLAN, group=None) | options),
        "unshard": (unshard, dict(x=q, plan=PLAN, dim=1, group=None, keys=False)),
        "cross_entropy": (
            cross_entropy,
            dict(logits=torch.ones(1, own.shape[1], 17), targets=targets, group=None, averaged_over=1),
        ),
        "reduce_gradients": (reduce_gradients, dict(parameters=parameters, group=None)),
        "Decoder.loss": (model.loss, dict(tokens=own, targets=targets, plan=PLAN, group=None, checkpoint=False)),
    }


def bad_calls(rank: int, seed: int) -> list[str]:
    """What each of many calls said on this rank; between them good ones, whose result is checked."""
    draw, messages = random.Random(seed), []
    expected = unshard(attention(*(calls(rank)["attention"][1][name] for name in "qkv"), PLAN), PLAN)
    for n in range(CASES):
        call, fine = calls(rank)[draw.choice(sorted(calls(rank)))]
        argument, label = draw.choice(sorted(fine)), draw.choice(sorted(BAD))
        bad = draw.choice([{0}, {1}, {2}, {0, 1, 2}])
        given = {**fine, argument: BAD[label]} if rank in bad else fine
        message = "no error"
        try:
            call(**given)
        except (InputError, MismatchError) as error:
            message = str(error)
        except RingAttnError as error:
            raise AssertionError(f"{call} {argument}={label} on {bad}: {type(error).__name__}: {error}") from error
        messages.append(f"{getattr(call, '__name__', call)}({argument}={label}) on {sorted(bad)}: {message}")
        if n % 10 == 0:
            again = unshard(attention(*(calls(rank)["attention"][1][name] for name in "qkv"), PLAN), PLAN)
            assert torch.equal(again, expected)
    return messages


@pytest.mark.parametrize("seed", [7, 8])
def test_what_one_rank_does_wrong_every_rank_hears_of(seed: int) -> None:
    first, *others = run_ranks(WORLD, bad_calls, seed, timeout=55)
    for message in zip(first, *others, strict=True):
        assert len(set(message)) == 1, message
        assert "no error" in message[0] or "rank" in message[0], message
    assert sum("no error" not in message for message in first) > CASES / 2
