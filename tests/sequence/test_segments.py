"""Tests masks, layouts and segments against their definition, cell by cell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, Mask, PlanError, causal, documents, full, prefix_lm, sliding_window
from ringattn.sequence.layout import LAYOUTS, Span, even_parts, take
from ringattn.sequence.segments import CAUSAL, FULL, Segment, strips, tile_segments

MASKS = st.one_of(
    st.just(full()),
    st.just(causal()),
    st.builds(sliding_window, st.integers(0, 30), st.integers(0, 9)),
    st.builds(prefix_lm, st.integers(0, 40)),
    st.builds(
        lambda ends, c: documents([0, *sorted(ends), 40], causal=c), st.lists(st.integers(0, 40), max_size=6), st.booleans()
    ),
)


def cells(segments: tuple[Segment, ...]) -> list[tuple[int, int]]:
    """Every (local row, local key) that the segments cover, with repetition."""
    return [
        (segment.q_start + row, segment.k_start + key)
        for segment in segments
        for row in range(segment.rows)
        for key in range(segment.keys)
        if segment.band.left <= key - row <= segment.band.right
    ]


def meaning(q_positions: list[int], k_positions: list[int], mask: Mask) -> list[tuple[int, int]]:
    return [(n, m) for n, q in enumerate(q_positions) for m, k in enumerate(k_positions) if mask.keeps(q, k)]


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(sorted(LAYOUTS)), MASKS, MASKS)
def test_segments_cover_exactly_what_the_mask_keeps(length: int, world: int, layout_name: str, a: Mask, b: Mask) -> None:
    layout, mask = LAYOUTS[layout_name](length, world), a & b
    for q_rank in range(world):
        for k_rank in range(world):
            segments = tile_segments(layout.shards[q_rank], layout.shards[k_rank], mask)
            listed = cells(segments)
            assert sorted(listed) == meaning(layout.positions(q_rank), layout.positions(k_rank), mask)
            assert sum(segment.area for segment in segments) == len(listed)
            for segment in segments:
                assert all(segment.visible(row) > 0 for row in range(segment.rows)), "a row of a segment sees no key"
                assert segment.band != CAUSAL or segment.rows == segment.keys, "a causal segment is square"
                assert sorted(cells(tuple(strips(segment, 3)))) == sorted(cells((segment,)))


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_under_causal_every_balanced_tile_is_one_kernel_call(layout: str, world: int) -> None:
    shards = LAYOUTS[layout](16 * world, world).shards
    for q_shard in shards:
        for k_shard in shards:
            (segment,) = tile_segments(q_shard, k_shard, causal())
            assert segment.band in (FULL, CAUSAL)


@given(st.integers(0, 50), st.integers(1, 9), st.sampled_from(sorted(LAYOUTS)))
def test_layouts_hold_every_position_once(length: int, world: int, name: str) -> None:
    layout = LAYOUTS[name](length, world)
    layout.validate(length)
    positions_of_rank = [layout.positions(rank) for rank in range(world)]
    assert sorted(p for positions in positions_of_rank for p in positions) == list(range(length))
    # zigzag assigns two chunks, each of which may be one row longer
    assert max(map(len, positions_of_rank)) - min(map(len, positions_of_rank)) <= (2 if name == "zigzag" else 1)
    assert [layout.rows(rank) for rank in range(world)] == [len(positions) for positions in positions_of_rank]


@given(st.integers(0, 30), st.integers(1, 8))
def test_taking_all_parts_gives_the_shard_back(length: int, parts: int) -> None:
    spans = (Span(3, length), Span(100, 7, 1))
    positions = [p for a, b in even_parts(length + 7, parts) for span in take(spans, a, b) for p in span.positions()]
    assert positions == [p for span in spans for p in span.positions()]


@pytest.mark.parametrize(
    ("shards", "text"),
    [
        (((Span(0, 4),), (Span(4, 3),)), "position 7 of .* is held by no rank"),
        (((Span(0, 5),), (Span(4, 4),)), "held twice"),
        (((Span(0, 4),), (Span(4, 5),)), "does not lie in"),
        (((Span(0, 4, 2),), (Span(1, 2, 3),)), "mixes strides"),
    ],
)
def test_layouts_that_do_not_partition_are_refused(shards, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Layout("mine", shards).validate(8)


@pytest.mark.parametrize(
    "make", [lambda: sliding_window(-1), lambda: prefix_lm(-3), lambda: documents([1, 4]), lambda: documents([0, 5, 4])]
)
def test_masks_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(PlanError):
        make()


def test_documents_of_different_totals_do_not_intersect() -> None:
    with pytest.raises(PlanError, match="8 and 9 tokens"):
        documents([0, 8]) & documents([0, 9])
