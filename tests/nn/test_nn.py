"""The decoder against plain torch, and loss and gradients on shards against the whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor

from ringattn import InputError, MismatchError, make_plan, positions, shard
from ringattn.nn import (
    Decoder,
    DecoderConfig,
    apply_rotary,
    cross_entropy,
    decoder,
    grads,
    reduce_gradients,
    rotary,
    shift_labels,
)
from ringattn.sequence.layout import Layout, Span

TINY = DecoderConfig(vocab_size=17, dim=12, layers=2, heads=6, kv_heads=2, head_dim=4, hidden_dim=20)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(TINY).to(dtype)


def plan_for(config: DecoderConfig, length: int, **given):
    heads = dict(heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return make_plan(length, **dict(world=1, schedule="ring", dtype="float64") | heads | given)


def tokens_of(length: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# Rotary embedding


def turned(x: Tensor, where: Tensor, theta: float) -> Tensor:
    """Rotary embedding as multiplication of complex numbers, in fp64."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angle = where.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    result = pairs * torch.exp(1j * angle)[:, None, :]
    return torch.cat([result.real, result.imag], dim=-1)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_multiplies_pairs_by_complex_phases(theta):
    x, where = torch.randn(2, 5, 3, 8), torch.tensor([0, 1, 7, 100, 4095])
    actual = apply_rotary(x, *rotary(where, 8, theta))
    torch.testing.assert_close(actual, turned(x, where, theta).float(), atol=2e-3, rtol=0)  # fp32 angles up to 4095 rad
    torch.testing.assert_close(actual[:, :3], turned(x, where, theta).float()[:, :3], atol=1e-6, rtol=0)


def test_rotary_goes_by_global_position_and_keeps_the_dtype():
    plan = plan_for(TINY, 23, world=3, layout="zigzag")
    x = torch.randn(1, 23, 2, 4, dtype=torch.bfloat16)
    whole = apply_rotary(x, *rotary(torch.arange(23), 4, 10_000.0))
    assert whole.dtype == torch.bfloat16
    for rank in range(3):
        own = apply_rotary(shard(x, plan, rank=rank), *rotary(positions(plan, rank), 4, 10_000.0))
        assert torch.equal(own, shard(whole, plan, rank=rank))


def test_rotary_angles_are_fp32_under_autocast():
    where = torch.tensor([1000, 1001])  # the same number in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary(where, 4, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, rotary(where, 4, 10_000.0)[0])
    assert cos[0, 0] != cos[1, 0]


# Configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers=0), "layers=0: must be a whole number of 1 or more"),
        (dict(dim=1.5), "dim=1.5"),
        (dict(heads=6, kv_heads=4), "heads=6 is not a multiple of kv_heads=4"),
        (dict(head_dim=3), "head_dim=3: must be even"),
        (dict(norm_eps=0.0), "norm_eps=0.0: must be positive"),
    ],
)
def test_config_refuses_what_cannot_work(change, message):
    with pytest.raises(InputError, match=message):
        DecoderConfig(**{**TINY.__dict__, **change})


# The decoder in one process


def plain(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The same decoder in plain torch: SDPA, repeated KV heads, complex rotary."""
    x = weights["embed_tokens.weight"][tokens]
    where = torch.arange(tokens.shape[1])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt() * weight

    for n in range(TINY.layers):
        w = {name.removeprefix(f"layers.{n}."): p for name, p in weights.items() if name.startswith(f"layers.{n}.")}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{c}_proj.weight"].T).unflatten(-1, (-1, TINY.head_dim)) for c in "qkv")
        q, k = turned(q, where, TINY.rope_theta), turned(k, where, TINY.rope_theta)
        k, v = (t.repeat_interleave(TINY.heads // TINY.kv_heads, dim=2) for t in (k, v))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + out.transpose(1, 2).flatten(-2) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        x = x + (F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["embed_tokens.weight"].T


def test_decoder_is_a_llama():
    model, tokens = tiny(), tokens_of(19)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    actual = model(tokens, plan_for(TINY, 19))
    torch.testing.assert_close(actual, plain(model.state_dict(), tokens), atol=1e-5, rtol=0)  # fp32 angles


@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_by_parts_is_the_loss_of_the_logits(monkeypatch, checkpoint):
    monkeypatch.setattr(decoder, "LOGIT_ROWS", 7)
    model, tokens, plan = tiny(), tokens_of(19), plan_for(TINY, 19)
    targets = shift_labels(tokens)
    whole = F.cross_entropy(model(tokens, plan).flatten(0, 1), targets.flatten())
    by_parts = model.loss(tokens, targets, plan, checkpoint=checkpoint)
    torch.testing.assert_close(by_parts, whole, atol=1e-12, rtol=0)
    pairs = zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (whole, by_parts)), strict=True)
    for expected, actual in pairs:
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_fresh_decoder_knows_nothing():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(256, 64, 2, 4, 2, 16, 128))
    tokens = torch.randint(256, (1, 64))
    loss = model.loss(tokens, shift_labels(tokens), plan_for(model.config, 64, dtype="float32"))
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.02)


def test_decoder_under_autocast_matches_fp32():
    model, tokens = tiny(dtype=torch.float32), tokens_of(40)
    exact = model.loss(tokens, shift_labels(tokens), plan_for(TINY, 40, dtype="float32"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.loss(tokens, shift_labels(tokens), plan_for(TINY, 40, dtype="bfloat16"))
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    assert rounded.item() != exact.item()


def test_decoder_refuses_tokens_and_targets_of_other_lengths():
    model, plan = tiny(), plan_for(TINY, 19)
    with pytest.raises(InputError, match=r"tokens has shape \(2, 18\), the plan gives rank 0 19 rows"):
        model(tokens_of(18), plan)
    with pytest.raises(InputError, match=r"targets has shape \(2, 18\) and tokens \(2, 19\)"):
        model.loss(tokens_of(19), tokens_of(18), plan)


# The loss


def test_labels_are_the_next_tokens():
    assert shift_labels(torch.tensor([[5, 6, 7], [1, 2, 3]])).tolist() == [[6, 7, -100], [2, 3, -100]]


def test_loss_is_fp32_whatever_the_logits():
    logits, targets = torch.randn(2, 9, 17).bfloat16(), tokens_of(9)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("rows", [0, 4])
def test_loss_without_a_target_is_zero(rows):
    logits = torch.randn(1, rows, 17, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, rows), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_loss_refuses_targets_of_another_shape():
    with pytest.raises(InputError, match=r"targets has shape \(1, 5\) and logits \(1, 4, 17\)"):
        cross_entropy(torch.randn(1, 4, 17), torch.zeros(1, 5, dtype=torch.int64))


def test_a_loss_whose_gradients_are_averaged_afterwards_has_larger_ones():
    logits, targets = torch.randn(1, 4, 17, dtype=torch.float64, requires_grad=True), torch.tensor([[1, -100, 5, 16]])
    losses = [cross_entropy(logits, targets, averaged_over=n) for n in (1, 3)]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.equal(*losses)
    torch.testing.assert_close(grads[1], 3 * grads[0], rtol=1e-15, atol=0)
    with pytest.raises(InputError, match="averaged_over=0: counts ranks, 1 or more"):
        cross_entropy(logits, targets, averaged_over=0)


# On three ranks, one of which holds nothing

UNEVEN = Layout("uneven", ((Span(2, 6),), (), (Span(0, 2), Span(8, 3))))


def on_shards(rank: int) -> dict:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 11, 17, dtype=torch.float64), tokens_of(11)
    targets = shift_labels(tokens)
    targets[1, 3:7] = -100
    plan = plan_for(TINY, 11, world=3, layout=UNEVEN)
    own = shard(logits, plan).requires_grad_()
    loss = cross_entropy(own, shard(targets, plan))
    loss.backward()
    none = cross_entropy(own, torch.full_like(shard(targets, plan), -100))

    model = tiny()
    trained = model.loss(shard(tokens, plan), shard(targets, plan), plan)
    trained.backward()
    reduce_gradients(model.parameters())

    grads.BUCKET_BYTES = 64  # of 8-byte numbers: several buckets
    mine = [
        torch.nn.Parameter(torch.zeros(3, 2, dtype=d)) for d in (torch.float64, torch.float32, torch.float64, torch.float64)
    ]
    mine[3].requires_grad_(False)
    mine[0].grad = torch.full((3, 2), 10.0**rank, dtype=torch.float64)
    if rank == 1:
        mine[1].grad = torch.ones(3, 2)
    reduce_gradients(mine)
    with pytest.raises(MismatchError, match="ranks disagree on shapes of parameters"):
        reduce_gradients([torch.nn.Parameter(torch.zeros(1 + rank))])
    return {
        "loss": loss.item(),
        "grad": own.grad.numpy(),
        "none": none.item(),
        "trained": trained.item(),
        "gradients": [p.grad.numpy() for p in model.parameters()],
        "reduced": [None if p.grad is None else p.grad.tolist() for p in mine],
    }


def test_loss_and_gradients_on_uneven_shards_are_those_of_the_whole():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 11, 17, dtype=torch.float64, requires_grad=True), tokens_of(11)
    targets = shift_labels(tokens)
    targets[1, 3:7] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    model = tiny()
    trained = F.cross_entropy(plain(dict(model.named_parameters()), tokens).flatten(0, 1), targets.flatten())
    trained.backward()

    ranks = run_ranks(3, on_shards)
    plan = plan_for(TINY, 11, world=3, layout=UNEVEN)
    for rank, actual in enumerate(ranks):
        assert actual["loss"] == pytest.approx(loss.item(), rel=1e-14)
        torch.testing.assert_close(torch.from_numpy(actual["grad"]), shard(logits.grad, plan, rank=rank), atol=1e-15, rtol=0)
        assert actual["none"] == 0
        assert actual["trained"] == pytest.approx(trained.item(), rel=1e-6)
        for (name, p), grad in zip(model.named_parameters(), actual["gradients"], strict=True):
            np.testing.assert_allclose(grad, p.grad, atol=1e-6, rtol=0, err_msg=name)
        first, second, third, fixed = actual["reduced"]
        assert first == [[111.0, 111.0]] * 3
        assert second == [[1.0, 1.0]] * 3  # two ranks had none
        assert third is None and fixed is None
    assert all(
        np.array_equal(a, b) for actual in ranks[1:] for a, b in zip(ranks[0]["gradients"], actual["gradients"], strict=True)
    )
