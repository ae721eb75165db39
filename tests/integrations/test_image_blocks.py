"""Blocks of tokens that see each other both ways inside causal text: the mask, and how transformers' own is read."""

from itertools import product

import pytest
import torch
from cases import EXACT, example, simulate, worst

from ringattn import Mask, PlanError, causal, documents, full, make_plan, prefix_lm, sliding_window
from ringattn.sequence.mask import bidirectional_blocks

BLOCKS = ((4, 9), (9, 12), (20, 31), (36, 37))
BASES = {
    "causal": causal(),
    "window": sliding_window(5),
    "documents": documents([0, 3, 14, 33, 37]),
    "prefix": prefix_lm(10),
    "window in documents": documents([0, 17, 37]) & sliding_window(4),
    "full": full(),
}


def same_block(q: int, k: int) -> bool:
    return any(start <= q < stop and start <= k < stop for start, stop in BLOCKS)


@pytest.mark.parametrize("name", BASES)
def test_a_block_sees_all_of_itself_and_else_what_was_seen_before(name: str) -> None:
    base, mask = BASES[name], bidirectional_blocks(BLOCKS, BASES[name])
    for q, k in product(range(37), range(37)):
        assert mask.keeps(q, k) == (base.keeps(q, k) or same_block(q, k)), (q, k)
        of = [r for r in mask.rects if r.q_start <= q < r.q_stop and r.k_start <= k < r.k_stop]
        assert len(of) <= 1  # disjoint: no pair of tokens counts twice
        assert all(r in mask.near(q, q + 1) for r in of)


@pytest.mark.parametrize("name", ["causal", "window", "window in documents"])
def test_every_schedule_equals_dense_attention(name: str) -> None:
    mask = bidirectional_blocks(BLOCKS, BASES[name])
    e = example((4, 2), 37, mask)
    expected = (e.out.detach(), e.lse.detach(), *e.grads)
    shape = dict(world=3, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask)
    for schedule, layout in product(("ring", "token_ring", "bidirectional_ring"), ("contiguous", "zigzag", "striped")):
        for kernel in ("reference", "sdpa"):
            plan = make_plan(37, **shape, schedule=schedule, layout=layout, kernel=kernel)
            assert worst(simulate(plan, e.q, e.k, e.v, e.dout), expected) < EXACT, (schedule, layout, kernel)


def test_bounds_that_make_no_sense_are_refused() -> None:
    for bounds in ([(4, 3)], [(0, 5), (4, 6)], [(6, 8), (0, 2)], [(1, 2, 3)], [(-1, 2)]):
        with pytest.raises(PlanError, match="bidirectional_blocks"):
            bidirectional_blocks(bounds)
    with pytest.raises(PlanError, match="within 10 tokens"):
        bidirectional_blocks([(0, 11)], documents([0, 10]))
    assert bidirectional_blocks([]).rects == causal().rects
    assert bidirectional_blocks([(3, 3)]).rects == causal().rects


def test_masks_of_transformers_are_read_as_they_are_meant() -> None:
    pytest.importorskip("transformers")
    from transformers import masking_utils as theirs

    from ringattn.integrations.transformers.batch import with_blocks
    from ringattn.integrations.transformers.mask_functions import blocks_of, read_mask

    ids = torch.full((1, 37), -1)
    for number, (start, stop) in enumerate(BLOCKS):
        ids[:, start:stop] = number
    plain, blocks = theirs.causal_mask_function, theirs.blockwise_overlay(ids)
    window = theirs.sliding_window_causal_mask_function(6)
    functions = {
        "causal": plain,
        "window": window,
        "blocks": theirs.or_masks(plain, blocks),
        "window or blocks": theirs.or_masks(window, blocks),
        "window over blocks": theirs.and_masks(theirs.or_masks(plain, blocks), theirs.sliding_window_overlay(6)),
    }
    for name, function in functions.items():
        reading = read_mask(function)
        actual = blocks_of(reading, None)
        mask: Mask = with_blocks(causal(), reading.window, *((actual.bounds[0], actual.under_window) if actual else ((),)))
        assert reading.causal and reading.unknown is None
        for q, k in product(range(37), range(37)):
            meant = bool(function(torch.tensor(0), torch.tensor(0), torch.tensor(q), torch.tensor(k)))
            assert mask.keeps(q, k) == meant, (name, q, k)
    packed = theirs.packed_sequence_compatibility_function(window, torch.arange(37)[None], torch.zeros(1, 37))
    assert read_mask(packed).packed and read_mask(packed).window == 6
    assert not read_mask(theirs.bidirectional_mask_function).causal
    unknown = {
        "chunked": theirs.chunked_causal_mask_function(4, torch.zeros(1)),
        "a user's": theirs.or_masks(plain, lambda b, h, q, k: q > 3),
        "blocks cut off": theirs.and_masks(theirs.or_masks(plain, blocks), plain),
        "blocks in documents": theirs.packed_sequence_compatibility_function(
            functions["blocks"], torch.arange(37)[None], torch.zeros(1, 37)
        ),
        "a union": theirs.or_masks(plain, window),
    }
    for name, function in unknown.items():
        assert read_mask(function).unknown, name
