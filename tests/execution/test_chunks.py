"""Keys of another layout than the queries: cross-attention, and prompts processed in chunks against all keys so far."""

from typing import Any

import pytest
import torch
from cases import EXACT, simulate, worst
from meaning import dense

from ringattn import InputError, Layout, PlanError, attention, causal, documents, full, make_plan, positions, shard, unshard
from ringattn.sequence.layout import Span, contiguous, zigzag

MODEL: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


def random_tensors(rows: int, keys: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = [(2, rows, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (2, rows, 4, 8)]
    return [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, **arguments)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize("schedule", ["auto", "ring", "token_ring", "mesh"])
@pytest.mark.parametrize(("rows", "keys"), [(5, 29), (29, 5), (3, 1)])
def test_cross_attention(schedule: str, rows: int, keys: int) -> None:
    plan = make_plan(rows, world=4, kv_len=keys, **MODEL, mask=full(), schedule=schedule)
    assert (plan.kv_len, sum(plan.kv_rows(r) for r in range(4))) == (keys, keys)
    tensors = random_tensors(rows, keys)
    assert worst(simulate(plan, *tensors), expected(*tensors, mask=full())) < EXACT


@pytest.mark.parametrize("schedule", ["auto", "ring", "token_ring"])
@pytest.mark.parametrize("layout", [contiguous, zigzag])
def test_a_prompt_in_chunks_is_the_prompt(schedule: str, layout: Any) -> None:
    """Every rank appends the new keys to its keys, and queries of a chunk attend to all keys up to their own."""
    sizes, tensors = (13, 8, 1, 1), random_tensors(23, 23)
    q, k, v, _ = tensors
    full_out, _ = dense(q, k, v, causal())
    resident, begin = None, 0
    for size in sizes:
        chunk = layout(size, 3)
        resident = chunk if resident is None else chunk.after(resident)
        plan = make_plan(size, world=3, layout=resident, **MODEL, schedule=schedule, training=False)
        assert (plan.kv_len, plan.layout.first) == (begin + size, begin)
        chunk_rows = slice(begin, begin + size)
        out, *_ = simulate(
            plan, q[:, chunk_rows], k[:, : begin + size], v[:, : begin + size], torch.zeros_like(q[:, chunk_rows])
        )
        assert worst((out,), (full_out[:, chunk_rows],)) < EXACT, (size, begin)
        begin += size
    assert begin == 23


def test_shards_of_queries_and_of_keys() -> None:
    plan = make_plan(4, world=1, kv_len=7, q_offset=3, **MODEL)
    q, k = torch.arange(4.0), torch.arange(7.0)
    assert positions(plan, 0).tolist() == [3, 4, 5, 6] and positions(plan, 0, keys=True).tolist() == [*range(7)]
    assert torch.equal(shard(q, plan, dim=0, rank=0), q) and torch.equal(shard(k, plan, dim=0, rank=0, keys=True), k)
    assert torch.equal(unshard(q, plan, dim=0), q) and torch.equal(unshard(k, plan, dim=0, keys=True), k)
    with pytest.raises(InputError, match="for 7 positions"):
        shard(q, plan, dim=0, rank=0, keys=True)
    with pytest.raises(InputError, match=r"k has shape .* the whole sequence|k has shape"):
        attention(torch.zeros(1, 4, 4, 8).double(), *torch.zeros(2, 1, 4, 2, 8).double(), plan)


def test_chunks_come_after_each_other_once() -> None:
    placed = make_plan(4, world=2, kv_len=7, q_offset=3, **MODEL, layout="contiguous").layout
    assert placed.after(contiguous(3, 2)).first == 3, "a layout that has an offset already is not moved further"
    with pytest.raises(PlanError, match="has 2 shards and the one before 3"):
        contiguous(4, 2).after(contiguous(4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_len": 8}, "pass the position of the first query among the keys, as in q_offset=4"),
        ({"kv_len": 0}, "kv_len=0; must be 1 or more"),
        ({"q_offset": -1}, "q_offset=-1; must be a whole number, 0 or more"),
        ({"q_offset": 1.5}, "q_offset=1.5; must be a whole number"),
        ({"kv_len": 8, "q_offset": 6, "mask": documents((0, 8))}, "is for 8 tokens and kv_len=8, seq_len=4 from 6 on"),
        ({"kv_len": 8, "q_offset": 0, "layout": "documents"}, "needs packed documents"),
        ({"layout": contiguous(4, 2), "kv_len": 9}, "kv_len=9 and layout='contiguous' has 4; leave kv_len out"),
        (
            {"layout": Layout("apart", contiguous(4, 2).shards, contiguous(4, 3))},
            "has 2 shards and its keys 3; give both as many",
        ),
        (
            {"layout": Layout("holes", contiguous(4, 2).shards, Layout("k", ((Span(1, 3),), ())))},
            "does not lie in|held by no rank",
        ),
    ],
)
def test_what_does_not_fit_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(4, world=2, **MODEL | arguments)
