"""Training on four ranks follows training in one process, loss by loss, for every kind of schedule."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from spawn import run_ranks

from ringattn import Schedule, make_plan, shard
from ringattn.nn import Decoder, DecoderConfig, reduce_gradients, shift_labels
from ringattn.schedule import token_ring

pytestmark = pytest.mark.slow

WORLD, LENGTH, STEPS = 4, 250, 20  # 250 rows do not divide by four
NINE_OVER_THREE = DecoderConfig(vocab_size=64, dim=36, layers=2, heads=9, kv_heads=3, head_dim=8, hidden_dim=64)
FOUR = DecoderConfig(vocab_size=64, dim=36, layers=2, heads=4, kv_heads=4, head_dim=8, hidden_dim=64)

RUNS: dict[str, tuple[DecoderConfig, str | Schedule]] = {
    "ring": (NINE_OVER_THREE, "ring"),
    "bidirectional_ring": (FOUR, "bidirectional_ring"),
    "token_ring": (NINE_OVER_THREE, "token_ring"),
    "token_ring_direct": (FOUR, token_ring(WORLD, routing="direct")),
}


def trained(config: DecoderConfig, schedule: str | Schedule, world: int) -> tuple[list[float], list[np.ndarray]]:
    """The loss of each step, and the parameters after the last one."""
    torch.manual_seed(0)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    source = torch.Generator().manual_seed(1)
    heads = dict(heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim)
    plan = make_plan(LENGTH, world=world, schedule=schedule, ulysses=1, **heads)
    losses = []
    for _ in range(STEPS):
        # Runs of equal tokens: something to learn, so that the parameters move.
        tokens = torch.randint(config.vocab_size, (2, LENGTH // 5), generator=source).repeat_interleave(5, dim=1)
        loss = model.loss(shard(tokens, plan), shard(shift_labels(tokens), plan), plan)
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().numpy() for p in model.parameters()]


def all_runs(rank: int) -> dict[str, tuple[list[float], list[np.ndarray]]]:
    return {name: trained(config, schedule, WORLD) for name, (config, schedule) in RUNS.items()}


@pytest.fixture(scope="module")
def on_four_ranks():
    return run_ranks(WORLD, all_runs)


@pytest.mark.parametrize("name", RUNS)
def test_training_follows_the_single_process(on_four_ranks, name):
    config, _ = RUNS[name]
    alone, _ = trained(config, "ring", 1)
    assert alone[-1] < 0.9 * alone[0]  # it does learn
    losses, parameters = on_four_ranks[0][name]
    assert losses == pytest.approx(alone, rel=1e-5)
    for other in on_four_ranks[1:]:
        assert other[name][0] == losses
        assert all(np.array_equal(a, b) for a, b in zip(parameters, other[name][1], strict=True))


def test_successive_losses_differ_by_more_than_the_tolerance(on_four_ranks):
    """Else the comparison above would not detect a missing step."""
    losses, _ = on_four_ranks[0]["ring"]
    assert all(abs(a - b) > 1e-4 * a for a, b in pairwise(losses))
