"""Tests merges, policies by position, causality, similarity and placement against plain lists.

A merge is a list of groups here, each a list of rows; "known" are the groups that are ready at a row. Causality is then: for
sequences that are equal up to a row, the same groups are known at every row up to it.
"""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn import InputError, Mask, causal, documents, full, prefix_lm, sliding_window
from ringattn.comm.simulated import Simulated
from ringattn.execution.sharding import resident_positions
from ringattn.merging import Merge, grid, segments, windows
from ringattn.merging.exchange import SlotExchange, gather_all_rows, read_slots, sum_to_slots
from ringattn.merging.matching import MAX_SIMILARITY, UNIT, fixed_point, similarity
from ringattn.merging.placement import (
    Placement,
    crosses_documents,
    is_causal,
    is_visible,
    keep_in_place,
    mask_edges,
    mask_over_slots,
    seen_before_ready,
    spread_evenly,
)
from ringattn.merging.policy_inputs import MatchArgs, uniform
from ringattn.merging.similar_rows import match_in_windows
from ringattn.sequence.layout import LAYOUTS, Layout, Span

Groups = list[list[int]]


def groups(merge: Merge, b: int = 0) -> Groups:
    """The rows of each group of sequence `b`, in order of their last rows."""
    into = merge.into[b].tolist()
    return [[row for row, to in enumerate(into) if to == last] for last in sorted(set(into) - {-1})]


def known(merge: Merge, at: int, b: int = 0) -> Groups:
    """The groups that are ready at row `at`."""
    ready = merge.ready[b].tolist()
    return [rows for rows in groups(merge, b) if ready[rows[-1]] <= at]


def labelled(labels: list[int]) -> Groups:
    actual: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if label >= 0:
            actual.setdefault(label, []).append(row)
    return sorted(actual.values(), key=lambda rows: rows[-1])


@st.composite
def labels(draw: st.DrawFn, batch: int = 2, most: int = 14) -> Tensor:
    length = draw(st.integers(1, most))
    of_sequence = st.lists(st.integers(-1, length - 1), min_size=length, max_size=length)
    return torch.tensor([draw(of_sequence) for _ in range(batch)])


@st.composite
def merges(draw: st.DrawFn, batch: int = 2) -> Merge:
    """Anything: scattered groups, deleted rows, decided late."""
    actual = draw(labels(batch))
    late = st.lists(st.integers(0, 6), min_size=actual.shape[1], max_size=actual.shape[1])
    after = torch.tensor([draw(late) for _ in range(batch)])
    return Merge.of(actual, decided=torch.arange(actual.shape[1]) + after if draw(st.booleans()) else None)


# Merges


@given(labels())
def test_rows_of_one_label_are_one_group_and_groups_are_numbered_by_their_last_rows(actual: Tensor) -> None:
    merge = Merge.of(actual)
    assert (merge.batch, merge.seq_len) == tuple(actual.shape)
    for b, given_labels in enumerate(actual.tolist()):
        expected = labelled(given_labels)
        assert groups(merge, b) == expected
        assert merge.counts[b] == len(expected)
        number = {row: n for n, rows in enumerate(expected) for row in rows}
        assert merge.numbers[b].tolist() == [number.get(row, -1) for row in range(merge.seq_len)]
        assert merge.leads[b].nonzero().flatten().tolist() == [rows[-1] for rows in expected]


@given(st.data(), labels(batch=1))
def test_a_group_is_ready_when_all_is_decided_of_the_rows_up_to_its_last(data: st.DataObject, actual: Tensor) -> None:
    length = actual.shape[1]
    decided = data.draw(st.lists(st.integers(0, length + 2), min_size=length, max_size=length))
    merge = Merge.of(actual[0], decided=torch.tensor(decided))
    for rows in groups(merge):
        last = rows[-1]
        assert merge.ready[0, last] == max(last, *decided[: last + 1])
    plain = Merge.of(actual)
    assert all(plain.ready[0, rows[-1]] == rows[-1] for rows in groups(plain))


@given(merges())
def test_the_latest_group_is_the_last_that_is_ready_and_readiness_never_falls(merge: Merge) -> None:
    for b in range(merge.batch):
        ready = [merge.ready[b, rows[-1]] for rows in groups(merge, b)]
        assert all(a <= b for a, b in pairwise(ready))
        for row in range(merge.seq_len):
            assert merge.latest[b, row] == len(known(merge, row, b)) - 1


def test_digests_are_equal_exactly_when_merges_are() -> None:
    labels = torch.tensor([[0, 0, 2, 2]])
    same = [
        Merge.of(labels),
        Merge.of(torch.tensor([3, 3, 0, 0])),
        Merge.of(labels.clone(), decided=torch.tensor([0, 1, 1, 3])),
    ]
    others = [Merge.of(labels, decided=torch.tensor([0, 2, 2, 3])), Merge.of(torch.tensor([0, 0, 2, 3])), Merge.of(labels - 1)]
    assert len({m.digest for m in same}) == 1
    assert len({m.digest for m in [same[0], *others]}) == 4


@given(st.data(), merges())
def test_two_merges_in_a_row_join_the_groups_whose_numbers_the_second_joins(data: st.DataObject, first: Merge) -> None:
    count = max(first.counts)
    assume(count)
    second = data.draw(labels(batch=first.batch, most=count).filter(lambda actual: actual.shape[1] == count))
    after = Merge.of(second if data.draw(st.booleans()) else second[:1])
    both = first.then(after)
    for b in range(first.batch):
        before = groups(first, b)
        joined = [[before[n] for n in ns if n < len(before)] for ns in groups(after, b if after.batch > 1 else 0)]
        expected = [sorted(row for rows in parts for row in rows) for parts in joined if parts]
        assert groups(both, b) == sorted(expected, key=lambda rows: rows[-1])
        for rows in groups(both, b):  # a group is not ready before its parts
            parts = [part for part in before if part[-1] in rows]
            assert both.ready[b, rows[-1]] >= max(first.ready[b, part[-1]] for part in parts)


@given(merges())
def test_a_merge_of_single_groups_behind_another_changes_nothing(first: Merge) -> None:
    assume(max(first.counts))
    both = first.then(Merge.of(torch.arange(max(first.counts))))
    assert torch.equal(both.into, first.into)
    for b in range(first.batch):
        for rows in groups(first, b):
            assert both.ready[b, rows[-1]] == first.ready[b, rows[-1]]


def test_what_is_never_known_is_not_known_after_another_merge() -> None:
    ends = torch.tensor([False, True, False, True])
    late = windows(8, 2).then(segments(ends, lookahead=1))
    assert groups(late) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert known(late, 4) == [] and known(late, 5) == [[0, 1, 2, 3]]
    assert known(late, 7) == [[0, 1, 2, 3]], "the end of the last is never read"


def test_a_composition_with_a_noncausal_merge_is_noncausal() -> None:
    pairs, noncausal = windows(8, 2), Merge.of(torch.arange(8) // 2, sees_all="looks ahead")
    assert noncausal.then(windows(4, 2)).sees_all == "looks ahead"
    assert pairs.then(Merge.of(torch.arange(4), sees_all="looks ahead")).sees_all == "looks ahead"
    assert pairs.then(windows(4, 2)).sees_all == ""


# Policies by position


CUTS = st.one_of(st.just(()), st.lists(st.integers(0, 23), max_size=5).map(lambda cuts: (0, *sorted(cuts), 23)))


@given(st.integers(1, 30), CUTS, st.sets(st.integers(0, 22)))
def test_windows_are_so_many_rows_each_anew_in_every_document_and_without_the_protected(factor, cuts, protected_rows) -> None:
    expected: Groups = [[row] for row in protected_rows]
    decided = {row: row for row in protected_rows}
    for begin, end in pairwise(cuts or (0, 23)):
        for first in range(begin, end, factor):
            rows = [row for row in range(first, min(first + factor, end)) if row not in protected_rows]
            expected += [rows] if rows else []
            full_end = first + factor if end == 23 else min(first + factor, end)  # where the sequence ends is no end
            decided |= dict.fromkeys(rows, full_end - 1)
    protected = torch.tensor([row in protected_rows for row in range(23)]) if protected_rows else None
    merge = windows(23, factor, protected=protected, cu_seqlens=cuts, batch=2)
    assert groups(merge, 0) == groups(merge, 1) == sorted(expected, key=lambda rows: rows[-1])
    assert not merge.sees_all
    for rows in expected:
        assert merge.ready[0, rows[-1]] == max(decided[row] for row in range(rows[-1] + 1))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 3))
def test_segments_are_the_rows_up_to_an_end_known_so_much_later(ends: list[bool], lookahead: int) -> None:
    expected: Groups = [[]]
    for row, is_end in enumerate(ends):
        expected[-1].append(row)
        if is_end and row + 1 < len(ends):
            expected.append([])
    merge = segments(torch.tensor(ends), lookahead=lookahead)
    assert groups(merge) == expected
    for row in range(len(ends)):
        assert known(merge, row) == [rows for rows in expected if ends[rows[-1]] and rows[-1] + lookahead <= row]


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_a_grid_joins_the_pixels_of_each_patch(height: int, width: int, rows: int, columns: int) -> None:
    patches: dict[tuple[int, int], list[int]] = {}
    for y in range(height):
        for x in range(width):
            patches.setdefault((y // rows, x // columns), []).append(y * width + x)
    merge = grid(height, width, (rows, columns), batch=2)
    assert groups(merge, 0) == groups(merge, 1) == sorted(patches.values(), key=lambda pixels: pixels[-1])


# Causality


def by_similarity(values: Tensor, scorer: str, threshold: float | None = None, protect: bool = False) -> Merge:
    """Rows of 3 channels in windows of 4; values also say who is protected."""
    metric = torch.stack([values % 3 - 1, values % 5 - 2, values % 2], dim=-1)[None].double()
    layout = LAYOUTS["contiguous"](len(values), 1)
    ask = MatchArgs(0.5 if threshold is None else None, threshold, scorer)
    (actual,) = match_in_windows([metric], [(values[None] == 5) & protect], layout, 4, (), ask, Simulated(1))
    return actual


def deleting(values: Tensor) -> Merge:
    return Merge.of(torch.arange(len(values)).where(values > 2, -1))


def then_windows(first: Merge, factor: int = 2) -> Merge:
    return first.then(windows(max(first.counts), factor)) if max(first.counts) else first


def then_deleting(first: Merge, values: Tensor) -> Merge:
    """Groups go by what their last rows hold."""
    return first.then(Merge.of(torch.arange(first.counts[0]).where(values[first.leads[0]] > 2, -1)))


CAUSAL = {
    "windows": lambda v: windows(len(v), 3),
    "segments": lambda v: segments(v < 2),
    "segments that end before a word": lambda v: segments(torch.cat([v[1:] < 2, torch.tensor([True])]), lookahead=1),
    "similar": lambda v: by_similarity(v, "alternate"),
    "similar, threshold": lambda v: by_similarity(v, "alternate", 0.3),
    "similar, energy": lambda v: by_similarity(v, "energy"),
    "similar, random": lambda v: by_similarity(v, "random"),
    "similar, protected": lambda v: by_similarity(v, "alternate", protect=True),
    "deleted": deleting,
    "segments, then windows": lambda v: then_windows(segments(v < 2), 3),
    "similar, then windows": lambda v: then_windows(by_similarity(v, "energy", 0.3)),
    "windows, then windows": lambda v: then_windows(windows(len(v), 2), 3),
    "windows, then windows, then windows": lambda v: then_windows(then_windows(windows(len(v), 2), 2), 2),
    "deleted, then windows": lambda v: then_windows(deleting(v)),
    "deleted, then windows, then windows": lambda v: then_windows(then_windows(deleting(v), 3)),
    "deleted, then segments": lambda v: deleting(v).then(segments(v[v > 2] > 3)) if max(deleting(v).counts) else deleting(v),
    "deleted, then deleted": lambda v: then_deleting(deleting(v), v % 2 * 5) if max(deleting(v).counts) else deleting(v),
    "windows, then deleted": lambda v: then_deleting(windows(len(v), 2), v),
    "similar, then deleted": lambda v: then_deleting(by_similarity(v, "alternate"), v),
    "segments, then windows, then deleted": lambda v: then_deleting(then_windows(segments(v < 2)), v),
}


@st.composite
def changed(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Two sequences that are equal up to a row."""
    length = draw(st.integers(1, 13))
    values = st.integers(0, 5)
    rows = draw(st.lists(values, min_size=length, max_size=length))
    same = draw(st.integers(0, length - 1))
    tail = draw(st.lists(values, min_size=length - same - 1, max_size=length - same - 1))
    return torch.tensor(rows), torch.tensor(rows[: same + 1] + tail), same


@pytest.mark.parametrize("policy", CAUSAL)
def test_sequences_that_are_equal_up_to_a_row_are_known_alike_up_to_there(policy: str) -> None:
    @given(changed())
    def run(example: tuple[Tensor, Tensor, int]) -> None:
        a, b = (CAUSAL[policy](values) for values in example[:2])
        assert not a.sees_all
        for at in range(example[2] + 1):
            assert known(a, at) == known(b, at)

    run()


@given(changed())
def test_sequences_of_a_batch_with_other_numbers_of_groups_are_known_alike_too(example: tuple[Tensor, Tensor, int]) -> None:
    kept = torch.stack(example[:2]) > 2
    first = Merge.of(torch.arange(kept.shape[1]).where(kept, -1))
    assume(max(first.counts))
    merge = first.then(windows(max(first.counts), 2))
    for at in range(example[2] + 1):
        assert known(merge, at, 0) == known(merge, at, 1)


@pytest.mark.parametrize("policy", ["similar", "similar, energy", "segments that end before a word"])
def test_a_merge_that_is_known_too_early_is_caught(policy: str) -> None:
    """The same, were groups known where they stand."""

    def early(values: Tensor) -> Merge:
        return Merge.of(CAUSAL[policy](values).into)

    source = torch.Generator().manual_seed(0)
    a, b = torch.randint(6, (2, 200, 12), generator=source)
    b[:, :6] = a[:, :6]
    assert any(known(early(x), 5) != known(early(y), 5) for x, y in zip(a, b, strict=True))
    assert all(known(CAUSAL[policy](x), 5) == known(CAUSAL[policy](y), 5) for x, y in zip(a, b, strict=True))


# Random numbers and fixed-point similarity


def by_hand(position: int, seed: int, layer: int, stream: int) -> float:
    """SplitMix64's mixing, in Python's own integers."""
    state, word = position, (1 << 64) - 1
    for number in (seed, layer, stream):
        state = (state + 0x9E3779B97F4A7C15 * (2 * number + 1)) & word
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
        state ^= state >> 31
    return ((state >> 12) + 0.5) / 2**52


@given(st.lists(st.integers(0, 2**40), max_size=20), st.integers(0, 2**64), st.integers(0, 200), st.integers(0, 9))
def test_random_numbers_are_those_of_their_place_whoever_draws_them(places, seed, layer, stream) -> None:
    example = uniform(torch.tensor(places, dtype=torch.int64), seed, layer, stream).tolist()
    assert example == [by_hand(place, seed, layer, stream) for place in places]


def test_random_numbers_are_spread_evenly_and_each_draw_is_another() -> None:
    places = torch.arange(20000)
    draws = [uniform(places, *which) for which in ((0, 0), (1, 0), (0, 1), (0, 0, 1))]
    for numbers in draws:
        assert numbers.min() > 0 and numbers.max() < 1
        shares = torch.histc(numbers, bins=10, min=0, max=1) / 2000
        assert (shares - 1).abs().max() < 0.08
    related = torch.corrcoef(torch.stack([*draws, draws[0].roll(1)])) - torch.eye(5)
    assert related.abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "error"), [(1, 0), (3, 3e-6), (64, 5e-6), (1024, 1e-5), (4096, 2e-5)])
def test_similarity_is_the_cosine_to_five_digits(dtype: torch.dtype, dim: int, error: float) -> None:
    rows = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    wide = rows.double()
    cosines = (wide @ wide.T) / wide.norm(dim=-1)[:, None] / wide.norm(dim=-1)
    assert ((similarity(fixed_point(rows), fixed_point(rows)) / MAX_SIMILARITY) - cosines).abs().max() <= error


@pytest.mark.parametrize("dim", [1, 7, 129, 4096])
def test_similarity_has_the_same_bits_in_any_tiling_and_order_of_rows_and_channels(dim: int) -> None:
    source = torch.Generator().manual_seed(dim)
    rows = torch.randn(24, dim, generator=source) * 10.0 ** torch.randint(-20, 20, (24, 1), generator=source)
    whole = similarity(fixed_point(rows), fixed_point(rows))
    directions = fixed_point(rows).tolist()
    by_integers = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in directions] for a in directions]
    assert whole.long().tolist() == by_integers
    order, channels = torch.randperm(24, generator=source), torch.randperm(dim, generator=source)
    assert torch.equal(similarity(*[fixed_point(rows[order])] * 2), whole[order][:, order])
    assert torch.equal(similarity(*[fixed_point(rows[:, channels])] * 2), whole)
    for size in (1, 5, 24):
        tiles = [[similarity(fixed_point(a), fixed_point(b)) for b in rows.split(size)] for a in rows.split(size)]
        assert torch.equal(torch.cat([torch.cat(of_a, dim=1) for of_a in tiles]), whole)
    assert torch.equal(fixed_point(rows * 2.0**9), fixed_point(rows))


def test_rows_without_a_direction_are_like_nothing() -> None:
    rows = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, math.nan], [3.0, -4.0]])
    actual = fixed_point(rows)
    assert actual.tolist() == [[0, 0]] * 4 + [[round(0.6 * UNIT), -round(0.8 * UNIT)]]
    assert fixed_point(torch.zeros(2, 0, 5)).shape == (2, 0, 5)
    tiny = torch.tensor([[1e-45, 0.0], [3e38, 3e38], [0.0, 1.0]])
    assert fixed_point(tiny).tolist() == [[UNIT, 0], [round(UNIT / math.sqrt(2))] * 2, [0, UNIT]]


# Where groups lie


@st.composite
def layouts(draw: st.DrawFn, length: int) -> Layout:
    """Named ones, or runs dealt anyhow: ranks may hold much, little or nothing. Never in stripes."""
    world = draw(st.integers(1, 5))
    name = draw(st.sampled_from(["contiguous", "zigzag", "dealt"]))
    if name != "dealt":
        return LAYOUTS[name](length, world)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, length), max_size=6))), length]
    spans = [(Span(a, b - a), draw(st.integers(0, world - 1))) for a, b in pairwise(cuts) if a < b]
    shards = tuple(tuple(span for span, rank in spans if rank == r) for r in range(world))
    return Layout("dealt", shards)


@given(st.data(), merges(), st.integers(1, 5), st.booleans(), st.lists(st.integers(0, 14), max_size=3))
def test_every_group_has_a_slot_in_order_and_stays_or_is_dealt_out_evenly(data, merge, bucket, is_even, protected_rows) -> None:
    layout = data.draw(layouts(merge.seq_len))
    placement = (spread_evenly if is_even else keep_in_place)(merge, layout, bucket, protected_rows)
    capacity = placement.layout.length
    placement.layout.validate(capacity)
    assert 1 <= capacity <= merge.seq_len and placement.layout.world == layout.world
    of_row = {row: rank for rank in range(layout.world) for row in layout.positions(rank)}
    of_slot = {slot: rank for rank in range(layout.world) for slot in placement.layout.positions(rank)}
    for b in range(merge.batch):
        leaders = placement.leaders[b].tolist()
        assert [row for row in leaders if row >= 0] == [rows[-1] for rows in groups(merge, b)], "in order, each once"
        for number, rows in enumerate(groups(merge, b)):
            slot = placement.slots[b, number].item()
            assert leaders[slot] == rows[-1]
            assert is_even or of_slot[slot] == of_row[rows[-1]]
        assert torch.equal(placement.slots_of(merge.numbers)[b] >= 0, merge.into[b] >= 0)
    if is_even:
        named = {name: make(capacity, layout.world) for name, make in LAYOUTS.items()}
        assert placement.layout == named.get(layout.name, named["contiguous"])
        assert any(0 < row < merge.seq_len for row in protected_rows) or capacity == min(
            -(-max(1, *merge.counts) // bucket) * bucket, merge.seq_len
        )


def test_counts_are_rounded_up_run_by_run_and_never_above_the_rows() -> None:
    labels = torch.tensor([[0, 0, 0, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6], [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]])
    merge = Merge.of(labels)  # leaders 2 3 4 5 13, and 0 1 2 13
    layout = Layout("dealt", ((Span(0, 3),), (Span(3, 6), Span(9, 0)), (), (Span(9, 5),)))
    capacities = {
        bucket: [keep_in_place(merge, layout, bucket).layout.rows(rank) for rank in range(4)] for bucket in (1, 2, 4, 8)
    }
    assert capacities == {1: [3, 3, 0, 1], 2: [3, 4, 0, 2], 4: [3, 4, 0, 4], 8: [3, 6, 0, 5]}
    assert [keep_in_place(merge, layout, 2).layout.positions(rank) for rank in range(4)] == [
        [0, 1, 2],
        [3, 4, 5, 6],
        [],
        [7, 8],
    ]


def test_with_every_row_deleted_one_empty_slot_is_left() -> None:
    merge = Merge.of(torch.full((2, 9), -1))
    for place in (keep_in_place, spread_evenly):
        placement = place(merge, LAYOUTS["zigzag"](9, 4))
        assert placement.layout.length == 1 and placement.leaders.tolist() == [[-1], [-1]]
        assert mask_over_slots(causal(), merge, placement).rects
    assert merge.latest.max() == -1 and merge.counts == (0, 0)


MASKS = st.one_of(
    st.just(full()),
    st.just(causal()),
    st.builds(prefix_lm, st.integers(0, 16)),
    st.tuples(st.lists(st.integers(0, 14), max_size=4), st.booleans()),
)


def mask_for(example: Mask | tuple[list[int], bool], length: int) -> Mask:
    """Documents are cut where it was drawn, for as many rows as there are."""
    if isinstance(example, Mask):
        return example
    return documents((0, *sorted(min(cut, length) for cut in example[0]), length), causal=example[1])


def check_mask(mask: Mask, over: Mask, placement: Placement) -> None:
    """Slot against slot: a group sees what its last row sees."""
    for leaders in placement.leaders.tolist():
        for s, row in enumerate(leaders):
            for t, key in enumerate(leaders):
                if row >= 0 and key >= 0:
                    assert over.keeps(s, t) == mask.keeps(row, key), (leaders, s, t)


@given(st.data(), merges(), MASKS, st.integers(1, 4), st.booleans())
def test_over_slots_a_group_sees_what_its_last_row_sees(data, merge, example, bucket, is_even) -> None:
    """Batches of unequal counts, ranks and documents without any group, and all masks without a window."""
    mask = mask_for(example, merge.seq_len)
    inner = mask_edges(mask, merge.seq_len)
    placement = (spread_evenly if is_even else keep_in_place)(merge, data.draw(layouts(merge.seq_len)), bucket, inner)
    over = mask_over_slots(mask, merge, placement)
    check_mask(mask, over, placement)
    assert (over.length is None) == (mask.length is None) and over.length in (None, placement.layout.length)
    assert mask_over_slots(mask, merge, placement).name == f"{mask.name} over groups"


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 20), st.integers(0, 9), st.integers(1, 3), st.booleans())
def test_over_equal_groups_a_window_sees_the_same_rows(factor, count, left, right, world, is_causal) -> None:
    merge = windows(factor * count, factor, batch=2)
    mask = sliding_window(left, right) & causal() if is_causal else sliding_window(left, right)
    for placement in (
        keep_in_place(merge, LAYOUTS["zigzag"](merge.seq_len, world)),
        spread_evenly(merge, LAYOUTS["striped"](merge.seq_len, world)),
    ):
        check_mask(mask, mask_over_slots(mask, merge, placement), placement)


def test_a_window_over_unequal_groups_is_refused() -> None:
    layout = LAYOUTS["contiguous"](7, 2)
    for merge in (windows(7, 2), Merge.of(torch.tensor([0, 1, 1, 3, 4, 5, 6])), Merge.of(torch.tensor([0, -1, 2, 3, 4, 5, 6]))):
        with pytest.raises(
            InputError, match=r"mask window\(3,0\): a window counts rows, and the last rows of these groups are at unequal"
        ):
            mask_over_slots(sliding_window(3), merge, keep_in_place(merge, layout))
    with pytest.raises(InputError, match="unequal distances"):  # an empty slot
        mask_over_slots(sliding_window(3), windows(8, 4), keep_in_place(windows(8, 4), LAYOUTS["contiguous"](8, 1), 8))


def test_stripes_cannot_stay() -> None:
    with pytest.raises(InputError, match=r"layout 'striped' holds every 2th row.*layout=\"even\""):
        keep_in_place(windows(8, 2), LAYOUTS["striped"](8, 2))
    keep_in_place(windows(2, 2), LAYOUTS["striped"](2, 2))  # a row each is no stripe


@given(merges(), MASKS, st.sampled_from([full(), causal(), prefix_lm(3), prefix_lm(9)]))
def test_a_row_that_the_last_of_its_group_does_not_see_is_found(merge: Merge, example, other: Mask) -> None:
    mask = mask_for(example, merge.seq_len) & other
    protected_rows = [
        row
        for b in range(merge.batch)
        for rows in groups(merge, b)
        for row in rows
        if row != rows[-1] and not mask.keeps(rows[-1], row)
    ]
    assert crosses_documents(merge, mask) == min(protected_rows, default=None)


@settings(max_examples=300)
@given(merges(batch=1), st.one_of(MASKS, st.builds(sliding_window, st.integers(0, 4), st.integers(0, 4))))
def test_a_group_that_is_shown_before_it_is_ready_is_found(merge: Merge, example) -> None:
    """A row before it may see the group, and not the row at which it is known what the group is."""
    mask, last = mask_for(example, merge.seq_len), [rows[-1] for rows in groups(merge)]
    end = merge.seq_len - 1  # what is never known within the sequence is at its end: who sees that far sees everything there is
    ready = {row: min(merge.ready[0, row].item(), end) for row in last}
    visible_early = [row for row in last if any(mask.keeps(t, row) and not mask.keeps(t, ready[row]) for t in range(row))]
    actual = seen_before_ready(merge, mask)
    if is_causal(mask) and not mask.bounds:
        assert not visible_early or actual is not None
        assert actual is None or merge.ready[0, actual] > actual
    else:
        assert actual is None


@pytest.mark.parametrize(("mask", "late"), [(prefix_lm(4), (0, 0, 0, 1, 5)), (sliding_window(9, 2), (0, 0, 1, 0, 5))])
def test_groups_are_untimely_from_the_first_row_on_that_is_not_shown_with_them(mask: Mask, late: tuple[int, ...]) -> None:
    where = torch.arange(5)
    first = next(n for n in range(5) if late[n])
    assert seen_before_ready(Merge.of(where, decided=where + torch.tensor(late)), mask) == first
    assert seen_before_ready(Merge.of(where, decided=torch.tensor([3, 3, 3, 3, 9])), prefix_lm(4)) is None
    assert seen_before_ready(Merge.of(where), mask) is None


@given(MASKS, st.sampled_from([full(), causal(), prefix_lm(3), sliding_window(2, 1), sliding_window(0)]), st.integers(1, 15))
def test_what_a_mask_keeps_is_seen(example: Mask | tuple[list[int], bool], other: Mask, length: int) -> None:
    mask = mask_for(example, length) & other
    row, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    expected = [[mask.keeps(q, k) for k in range(length)] for q in range(length)]
    assert is_visible(mask, row, key).tolist() == expected


# Exchange between rows and slots


@given(st.data(), labels(), st.integers(0, 3))
def test_rows_are_summed_to_slots_and_read_back_and_bytes_are_those_that_move(data, slots, seed) -> None:
    before = data.draw(layouts(slots.shape[1]))
    world, capacity = before.world, slots.shape[1]
    after = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](capacity, world)
    source = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, n, 3, generator=source, dtype=torch.float64) for n in (slots.shape[1], capacity))
    rows, cells = ([resident_positions(layout, rank) for rank in range(world)] for layout in (before, after))
    exchanges = [SlotExchange(slots, before, after, rank) for rank in range(world)]
    transport = Simulated(world, shuffle=seed)
    leaves = [x[:, own].requires_grad_() for own in rows]
    sums = sum_to_slots(exchanges, leaves, transport)
    owner = [{p: rank for rank in range(world) for p in layout.positions(rank)} for layout in (before, after)]
    moved = {
        (owner[0][row], owner[1][slot], b, slot) for b in range(2) for row, slot in enumerate(slots[b].tolist()) if slot >= 0
    }
    expected = Counter((a, b) for a, b, *_ in moved if a != b)
    expected = {link: 24 * count for link, count in expected.items()}
    assert transport.bytes_sent == expected
    backs = read_slots(exchanges, [y[:, own] for own in cells], transport)
    both_ways = {link: expected.get(link, 0) + expected.get(link[::-1], 0) for link in transport.bytes_sent}
    assert transport.bytes_sent == both_ways, "read_slots sends as much, the other way"
    for rank in range(world):
        for b in range(2):
            for n, slot in enumerate(cells[rank].tolist()):
                mine = [x[b, row] for row in range(slots.shape[1]) if slots[b, row] == slot]
                torch.testing.assert_close(sums[rank][b, n], sum(mine, torch.zeros(3, dtype=torch.float64)))
            for n, row in enumerate(rows[rank].tolist()):
                slot = slots[b, row]
                assert torch.equal(backs[rank][b, n], y[b, slot] if slot >= 0 else torch.zeros(3, dtype=torch.float64))
    grads = torch.autograd.grad(sums, leaves, [y[:, own] for own in cells])
    assert all(torch.equal(grad, back) for grad, back in zip(grads, backs, strict=True)), (
        "backward of sum_to_slots is read_slots"
    )


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_gathered_rows_are_in_the_order_of_the_sequence(layout: str, world: int) -> None:
    for whole in (torch.arange(6).view(2, 3), torch.arange(26).view(2, 13), torch.arange(13)[None] % 3 == 0):
        layout_of_rows = LAYOUTS[layout](whole.shape[1], world)
        transport = Simulated(world)
        actual = gather_all_rows(
            [whole[:, resident_positions(layout_of_rows, rank)] for rank in range(world)], layout_of_rows, transport
        )
        assert all(torch.equal(gathered, whole) for gathered in actual)
        sizes = {rank: len(whole) * layout_of_rows.rows(rank) * whole.element_size() for rank in range(world)}
        assert transport.bytes_sent == {(a, b): sizes[a] for a in range(world) for b in range(world) if a != b and sizes[a]}


# Mistakes


def test_mistakes_are_named() -> None:
    for message, call in {
        r"labels: torch.float32 of shape \(1, 4\); give int64": lambda: Merge.of(torch.zeros(4)),
        r"labels: torch.int64 of shape \(0, 4\).*not empty": lambda: Merge.of(torch.zeros(0, 4).long()),
        "labels: 4 is in a sequence of 4 rows; number groups from 0": lambda: Merge.of(torch.arange(1, 5)),
        r"decided: torch.int64 of shape \(1, 3\)": lambda: Merge.of(torch.arange(4), decided=torch.arange(3)),
        r"decided: torch.float32 of shape \(1, 4\)": lambda: Merge.of(torch.arange(4), decided=torch.zeros(4)),
        "leaves 4 groups in 1 sequences and `after` merges 8 rows of 1": lambda: windows(8, 2).then(windows(8, 2)),
        "`after` merges 4 rows of 2": lambda: windows(8, 2).then(windows(4, 2, batch=2)),
        "windows of 0 rows: must be 1 or more": lambda: windows(8, 0),
        r"cu_seqlens=\[0, 5\]": lambda: windows(8, 2, cu_seqlens=(0, 5)),
        r"cu_seqlens=\[1, 8\]": lambda: windows(8, 2, cu_seqlens=(1, 8)),
        r"cu_seqlens=\[0, 5, 3, 8\]": lambda: windows(8, 2, cu_seqlens=(0, 5, 3, 8)),
        r"protected: torch.bool of shape \(7,\); give bool \(8,\)": lambda: windows(8, 2, protected=torch.ones(7).bool()),
        r"protected: torch.int64 of shape \(8,\)": lambda: windows(8, 2, protected=torch.arange(8)),
        r"ends: torch.int64 of shape \(1, 8\)": lambda: segments(torch.arange(8)),
        "lookahead=-1": lambda: segments(torch.arange(8) > 3, lookahead=-1),
        r"grid\(0, 4, by=\(2, 2\)\)": lambda: grid(0, 4),
        r"grid\(4, 4, by=\(2, 0\)\)": lambda: grid(4, 4, (2, 0)),
        "metric has 4097 channels and similarity is exact for at most 4096": lambda: fixed_point(torch.zeros(1, 4097)),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
