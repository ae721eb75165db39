"""Difficult input on four real ranks: odd memory, odd lengths, rows without keys, NaN, and logits that overflow."""

from collections.abc import Callable

import pytest
import torch
from cases import EXACT, worst
from meaning import dense
from spawn import run_ranks
from torch import Tensor

from ringattn import InputError, Mask, Plan, attention, causal, documents, full, make_plan, positions, shard, sliding_window

RANKS = 4
SCHEDULES = ("ring", "token_ring", "bidirectional_ring", "mesh")

QKV = tuple[Tensor, Tensor, Tensor]


def plan_for(length: int, schedule: str, mask: Mask, **changes: object) -> Plan:
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64") | changes
    return make_plan(length, world=RANKS, mask=mask, schedule=schedule, layout="contiguous", **shape)


def full_tensors(length: int, dtype: torch.dtype = torch.float64) -> QKV:
    source = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, length, heads, 8, generator=source, dtype=torch.float64).to(dtype) for heads in (4, 2, 2))


def on_ranks(plan: Plan, tensors: QKV, **options: object) -> list[Tensor]:
    """out, lse and gradients of the sum of out, this rank's rows."""
    q, k, v = (shard(x, plan).requires_grad_() for x in tensors)
    out, lse = attention(q, k, v, plan, return_lse=True, **options)
    return [out.detach(), lse, *torch.autograd.grad(out.sum(), (q, k, v))]


def expected(plan: Plan, tensors: QKV, **options: object) -> list[Tensor]:
    """The same from dense attention to the whole, in fp64."""
    leaves = [x.double().requires_grad_() for x in tensors]
    out, lse = dense(*leaves, plan.mask, **options)
    return [
        shard(out.detach(), plan),
        shard(lse.detach(), plan, dim=2),
        *(shard(g, plan) for g in torch.autograd.grad(out.sum(), leaves)),
    ]


def any_memory(rank: int) -> None:
    for schedule in SCHEDULES:
        plan, (q, k, v) = plan_for(37, schedule, causal()), full_tensors(37)
        k = k[:1].expand(2, -1, -1, -1)
        own = [shard(x, plan) for x in (q, k, v)]
        odd = own[0].transpose(1, 2).contiguous().transpose(1, 2), own[1][:1].expand(2, -1, -1, -1), own[2].flip(-1).flip(-1)
        odd_v = torch.stack([odd[2], odd[2]], dim=-1)[..., 0]  # stride 2 in the last dimension
        assert not any(x.is_contiguous() for x in (*odd[:2], odd_v)) or not own[0].numel()
        leaves = [[x.contiguous().requires_grad_() for x in own], [x.requires_grad_() for x in (*odd[:2], odd_v)]]
        plain, strange = ([(out := attention(*qkv, plan)).detach(), *torch.autograd.grad(out.sum(), qkv)] for qkv in leaves)
        assert all(torch.equal(a, b) for a, b in zip(plain, strange, strict=True)), schedule


def any_length(rank: int) -> None:
    for length in (1, 2, 3, 7, 18):
        for schedule in SCHEDULES:
            plan, tensors = plan_for(length, schedule, causal()), full_tensors(length)
            assert worst(tuple(on_ranks(plan, tensors)), tuple(expected(plan, tensors))) < EXACT, (length, schedule)


def no_keys(rank: int) -> None:
    """By mask: documents and windows leave whole tiles empty. By bias: all keys of rank 1 are padding, and in one sequence
    the first 20, so that all rows of ranks 0 and 1 there, and one of rank 2, have no key."""
    bias = torch.zeros(2, 37, dtype=torch.float64)
    bias[:, 10:19], bias[1, :20] = -torch.inf, -torch.inf
    for schedule in SCHEDULES:
        for mask in (causal(), documents((0, 9, 10, 30, 37)), sliding_window(3)):
            plan, tensors = plan_for(37, schedule, mask), full_tensors(37)
            actual = on_ranks(plan, tensors, key_bias=shard(bias, plan))
            assert worst(tuple(actual), tuple(expected(plan, tensors, key_bias=bias))) < EXACT, (schedule, mask)
            empty = actual[1] == -torch.inf
            assert empty.any() == (rank < 3) and (actual[0].transpose(1, 2)[empty] == 0).all()
            assert all(x.isfinite().all() for x in (actual[0], *actual[2:]))
        # A bias of -inf everywhere on every rank: no row has a key.
        actual = on_ranks(plan, tensors, key_bias=torch.full_like(shard(bias, plan), -torch.inf))
        assert (actual[1] == -torch.inf).all() and not any(x.any() for x in (actual[0], *actual[2:]))


def not_numbers(rank: int) -> None:
    """They appear in every row that attends to them, and in no row of an earlier rank."""
    for schedule in SCHEDULES:
        plan, (q, k, v) = plan_for(37, schedule, causal()), full_tensors(37)
        clean = on_ranks(plan, (q, k, v))[0]
        q[1, 5, 0, 0], k[1, 30, 0, 2], v[0, 20, 1, 3] = torch.nan, torch.nan, torch.inf
        actual, rows = on_ranks(plan, (q, k, v))[0], positions(plan)
        assert actual[1, rows == 5, 0].isnan().all() and actual[1, rows >= 30, :2].isnan().all()
        assert not actual[0, rows >= 20, 2:, 3].isfinite().any()
        before = (actual[1, :, 2:], clean[1, :, 2:]) if rank > 1 else (actual[0], clean[0])  # ranks 2 and 3 hold 19 to 36
        assert torch.equal(*before)
        with pytest.raises(InputError, match=r"on rank 0: layer 7: q holds 1 NaN and 0 infinities, the first at \(1, 5"):
            attention(*(shard(x, plan) for x in (q, k, v)), plan, check_finite="layer 7")


def large_logits(rank: int) -> None:
    """Errors of out, relative to those of torch's own attention to the whole in that dtype: rounding q and k alone moves
    logits of 10,000 by units in bf16, so no fixed tolerance would be meaningful."""
    for dtype in (torch.float32, torch.bfloat16):
        for schedule in SCHEDULES:
            plan, (q, k, v) = plan_for(37, schedule, full(), dtype=str(dtype)), full_tensors(37, dtype)
            q, k = q * 60, k * 60
            exact, lse = dense(q.double(), k.double(), v.double(), full())
            assert lse.abs().max() > 1e4
            heads = [x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
            torchs = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
            actual = on_ranks(plan, (q, k, v))
            assert all(x.isfinite().all() for x in actual)
            allowed = 1.5 * (torchs.double() - exact).norm() + 1e-6 * exact.norm()
            assert (actual[0].double() - shard(exact, plan)).norm() <= allowed, (dtype, schedule)


@pytest.mark.slow
@pytest.mark.parametrize(
    "on_every_rank",
    [
        pytest.param(any_memory, marks=pytest.mark.case(12)),
        pytest.param(any_length, marks=pytest.mark.case(13)),
        pytest.param(no_keys, marks=pytest.mark.case(14)),
        pytest.param(not_numbers, marks=pytest.mark.case(15)),
        pytest.param(large_logits, marks=pytest.mark.case(16)),
    ],
)
def test_difficult_input(on_every_rank: Callable[[int], None]) -> None:
    run_ranks(RANKS, on_every_rank)
