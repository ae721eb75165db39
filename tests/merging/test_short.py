"""Tests merged sequences on ranks: attention over groups equals attention over their rows; no row depends on a later one."""

import dataclasses
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from cases import EXACT, simulate, worst
from meaning import dense
from spawn import run_ranks
from torch import Tensor
from torch.nn.functional import pad

from ringattn import (
    InputError,
    Mask,
    MismatchError,
    Plan,
    Topology,
    attention,
    causal,
    documents,
    full,
    make_plan,
    positions,
    prefix_lm,
    shard,
    sliding_window,
)
from ringattn.comm.simulated import Simulated
from ringattn.merging import LayerCost, Merge, MergedSequence, RateController, bipartite, shorten, similar, windows
from ringattn.merging.placement import choose_placement
from ringattn.nn import DecoderConfig, Merging, MergingDecoder, reduce_gradients, shift_labels
from ringattn.planner.cost import traffic

HEADS = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scattered(length: int, batch: int = 2) -> Merge:
    """Groups of one to many rows, scattered, others in every sequence, and a few rows deleted."""
    labels = torch.randint(length // 3, (batch, length), generator=torch.Generator().manual_seed(3))
    return Merge.of(labels.where(torch.rand(batch, length, generator=torch.Generator().manual_seed(4)) > 0.1, -1))


# Attention over groups


def groups_of(merge: Merge, x: Tensor) -> tuple[Tensor, Tensor]:
    """The means of each group, in order of their last rows, and the sizes; sequences with fewer groups are filled with 0."""
    means = x.new_zeros(len(x), max(merge.counts), *x.shape[2:])
    sizes = torch.zeros(len(x), max(merge.counts), dtype=torch.int64)
    for b, into in enumerate(merge.into.tolist()):
        for number, leader in enumerate(sorted(set(into) - {-1})):
            rows = [n for n, to in enumerate(into) if to == leader]
            means[b, number], sizes[b, number] = x[b, rows].mean(0), len(rows)
    return means, sizes


def run_on_rank(world: int, layout: str, schedule: str, kept: str) -> list:
    """Merge q, k and v, attend with log sizes, unmerge; gradients of all inputs, gathered by position."""
    length, merge = 23, scattered(23)
    plan = make_plan(length, world=world, schedule=schedule, layout=layout, mask=full(), **HEADS)
    short = shorten(merge, plan, layout=kept, schedule=schedule)
    rows = [shard(random(2, length, heads, 8, seed=n), plan).requires_grad_() for n, heads in enumerate((4, 2, 2))]
    gate = shard(random(2, length, seed=7), plan).requires_grad_()  # a second, differentiable bias, as of a gate
    q, k, v = (short.merge(x) for x in rows)
    out = attention(q, k, v, short.plan, key_bias=short.key_bias + short.merge(gate, "last"))
    back = short.unmerge(out)
    grads = torch.autograd.grad(back, [*rows, gate], shard(random(2, length, 4, 8, seed=9), plan))
    return [x.detach().numpy() for x in (positions(plan), back, *grads)]


WAYS = [("zigzag", "token_ring", "stay"), ("striped", "ring", "even"), ("contiguous", "mesh", "stay")]


def run_all_ways(rank: int, world: int) -> list[list]:
    return [run_on_rank(world, *way) for way in WAYS]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_attention_over_groups_is_attention_over_their_rows(world):
    """Each group as often as it has rows, dense; with gradients, those of a gate in the bias included."""
    for ranks in zip(*(run_ranks(world, run_all_ways, world) if world > 1 else [run_all_ways(0, 1)]), strict=True):
        order = torch.from_numpy(np.concatenate([r[0] for r in ranks])).argsort()
        parts = list(zip(*ranks, strict=True))[1:]
        actual = tuple(torch.from_numpy(np.concatenate(part, axis=1))[:, order] for part in parts)
        assert worst(actual, over_copies()) < EXACT


@cache
def over_copies() -> tuple[Tensor, ...]:
    merge, leaves = scattered(23), [random(2, 23, heads, 8, seed=n).requires_grad_() for n, heads in enumerate((4, 2, 2))]
    gate = random(2, 23, seed=7).requires_grad_()
    means = [groups_of(merge, x)[0] for x in leaves]
    sizes = groups_of(merge, leaves[0])[1]
    empty = [max(merge.counts) - count for count in merge.counts]
    last = torch.stack([pad(g[leads], (0, n)) for g, leads, n in zip(gate, merge.leads, empty, strict=True)])
    copies = int(sizes.max())
    there = torch.arange(copies) < sizes.unsqueeze(-1)  # (batch, groups, copies)
    bias = last.unsqueeze(-1).expand(there.shape).masked_fill(~there, -torch.inf).flatten(1)
    k, v = (x.repeat_interleave(copies, dim=1) for x in means[1:])
    out, _ = dense(means[0], k, v, full(), key_bias=bias)
    numbers = merge.numbers
    back = torch.stack([o[n.clamp(min=0)] * (n >= 0)[:, None, None] for o, n in zip(out, numbers, strict=True)])
    return back.detach(), *torch.autograd.grad(back, [*leaves, gate], random(2, 23, 4, 8, seed=9))


@pytest.mark.parametrize("how", ["mean", "sum", "last"])
def test_merge_computes_mean_sum_and_last(how):
    merge, x = scattered(23), random(2, 23, 3)
    plan = make_plan(23, world=1, mask=full(), schedule="ring", **HEADS)
    means, sizes = groups_of(merge, x)
    last = torch.zeros_like(means)
    for b, into in enumerate(merge.into.tolist()):
        last[b, : merge.counts[b]] = x[b, sorted(set(into) - {-1})]
    expected = {"mean": means, "sum": means * sizes.unsqueeze(-1), "last": last}[how]
    short = shorten(merge, plan, schedule="ring")
    torch.testing.assert_close(short.merge(x, how), expected, atol=1e-14, rtol=1e-14)
    assert torch.equal(short.sizes, sizes)
    assert torch.equal(short.merge(torch.ones(2, 23, dtype=torch.int64), "sum"), sizes)


def test_a_learned_mean_weighs_rows_and_gives_its_weights_gradients():
    merge, x, weights = scattered(23), random(2, 23, 3), random(2, 23, seed=1).exp().requires_grad_()
    plan = make_plan(23, world=1, mask=full(), schedule="ring", **HEADS)
    actual = shorten(merge, plan, schedule="ring").merge(x, weights=weights)
    number = merge.numbers
    inside = (number.unsqueeze(1) == torch.arange(actual.shape[1])[:, None]).double()  # (batch, groups, rows)
    shares = inside * weights.unsqueeze(1)
    expected = (shares @ x) / shares.sum(-1, keepdim=True).where(shares.sum(-1, keepdim=True) > 0, 1)
    torch.testing.assert_close(actual, expected)
    dy = random(*actual.shape, seed=2)
    torch.testing.assert_close(*(torch.autograd.grad(y, weights, dy)[0] for y in (actual, expected)))


def test_two_merges_in_a_row_are_their_composition():
    x, plan = random(1, 24, 3), make_plan(24, world=1, mask=full(), schedule="ring", **HEADS)
    first = Merge.of(torch.arange(24) // 2)
    second = Merge.of(torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 6]))
    a = shorten(first, plan, schedule="ring")
    b = shorten(second, a.plan, schedule="ring")
    sizes = b.merge(a.sizes, "sum")
    both = shorten(first.then(second), plan, schedule="ring")
    assert torch.equal(both.sizes, sizes)
    assert torch.equal(both.positions, b.merge(a.positions, "last"))
    torch.testing.assert_close(both.merge(x), b.merge(a.merge(x), weights=a.sizes.double()))


# Causality


TINY = DecoderConfig(vocab_size=40, dim=16, layers=4, heads=2, kv_heads=2, head_dim=8, hidden_dim=24)
LENGTH = 41
CAUSAL = {
    "windows": dict(factor=3),
    "windows, protected": dict(factor=2, protect=3),
    "windows, last": dict(factor=3, how="last"),
    "windows, learned": dict(factor=3, how="learned"),
    "similar": dict(window=8),
    "similar, threshold": dict(window=8, threshold=0.1),
    "similar, energy": dict(window=8, scorer="energy", remove=0.4),
    "similar, random": dict(window=8, scorer="random"),
    "words": dict(ends=(1, 2, 3, 4, 5, 6, 7, 8)),
    "gate": {},
}


def model_of(policy: str, layout: str = "stay") -> MergingDecoder:
    torch.manual_seed(0)
    # Room for as many groups as there are rows: with other shapes a matrix product may give other last bits.
    merging = Merging(policy.split(",")[0], 1, 3, schedule="ring", layout=layout, bucket=LENGTH, **CAUSAL[policy])
    model = MergingDecoder(TINY, merging).double().eval()
    if policy == "gate":
        torch.nn.init.normal_(model.gate.weight)
        torch.nn.init.zeros_(model.gate.bias)
    if policy.endswith("learned"):
        torch.nn.init.normal_(model.weigh.weight)
    return model


def tokens_of(changed: int | None = None) -> Tensor:
    tokens = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if changed is not None:
        tokens[:, changed] = (tokens[:, changed] + 17) % 40
    return tokens


@torch.no_grad()
def first_difference(policy: str, world: int = 1, mask: Mask | None = None, leak: str = "") -> dict[int, int]:
    """For some tokens that are changed: the first position of this rank at which any logit is another number."""
    options = dict(heads=2, head_dim=8, dtype="float64", schedule="ring", layout="zigzag", mask=mask or causal())
    plan, model = make_plan(LENGTH, world=world, **options), model_of(policy)
    if leak == "decision":  # ready at a group's last row, though the choice depends on later rows of the window
        original = model._merge
        model._merge = lambda *options: Merge.of(original(*options).into)
    if leak == "content":  # every row reads its own group, complete or not
        original_shortened = model._shorten

        def opened(*options):
            short = original_shortened(*options)
            short.__dict__["_from_groups"] = short._to_groups
            return short

        model._shorten = opened
    where, actual = positions(plan), {}
    before = model(shard(tokens_of(), plan), plan)
    for changed in (0, 3, 7, 8, 13, 20, 21, 22, 31, 39, 40)[:: 1 + 3 * (world > 4)]:
        after = model(shard(tokens_of(changed), plan), plan)
        differs = (before != after).any(-1).any(0)
        actual[changed] = int(where[differs].min()) if differs.any() else LENGTH
    return actual


def first_differences(rank: int, world: int, jobs: list[tuple]) -> list[dict[int, int]]:
    return [first_difference(policy, world, *more) for policy, *more in jobs]


@cache
def earliest(world: int, *jobs: tuple) -> list[dict[int, int]]:
    """The same over all ranks, for several jobs: processes are started once."""
    ranks = run_ranks(world, first_differences, world, jobs) if world > 1 else [first_differences(0, 1, list(jobs))]
    return [{changed: min(r[changed] for r in of_job) for changed in of_job[0]} for of_job in zip(*ranks, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("policy", CAUSAL)
def test_no_token_changes_a_bit_of_earlier_positions(policy, world):
    (actual,) = earliest(world, (policy,))
    assert all(first == changed for changed, first in actual.items()), actual  # and it does change its own position


LEAKS = [("windows", "content"), ("similar", "content"), ("words", "content"), ("similar", "decision")]


@pytest.mark.parametrize("leak", LEAKS, ids=" ".join)
def test_a_leaky_merge_is_caught(leak):
    actual = earliest(2, *((policy, None, kind) for policy, kind in LEAKS))[LEAKS.index(leak)]
    assert any(first < changed for changed, first in actual.items()), actual


PACKED = documents((0, 9, 10, 22, LENGTH))


@pytest.mark.parametrize("policy", ["windows", "similar", "words", "gate"])
def test_documents_do_not_depend_on_each_other(policy):
    """Nor on later rows; the documents have different numbers of groups."""
    actual = earliest(2, *((p, PACKED) for p in ("windows", "similar", "words", "gate")))
    assert all(first == changed for of_policy in actual for changed, first in of_policy.items())
    plan = make_plan(LENGTH, world=1, heads=2, head_dim=8, dtype="float64", schedule="ring", mask=PACKED)
    model = model_of(policy)
    with torch.no_grad():
        rows = (model(tokens_of(), plan) != model(tokens_of(12), plan)).any(-1).any(0).nonzero().flatten().tolist()
    assert min(rows) == 12 and max(rows) < 22


def test_a_noncausal_merge_is_refused_under_a_causal_mask():
    plan = make_plan(LENGTH, world=1, schedule="ring", **HEADS)
    merge = bipartite(random(2, LENGTH, 8), plan.layout, remove=0.5)
    for mask in (causal(), prefix_lm(4), documents((0, LENGTH)), causal() & documents((0, LENGTH))):
        with pytest.raises(InputError, match="decides from the whole sequence"):
            shorten(merge, make_plan(LENGTH, world=1, schedule="ring", mask=mask, **HEADS), schedule="ring")
    shorten(merge, make_plan(LENGTH, world=1, schedule="ring", mask=full(), **HEADS), schedule="ring")


# The decoder on ranks


def loss_and_gradients(policy: str, world: int = 1, layout: str = "stay", training: bool = False) -> tuple[Tensor, ...]:
    """The loss of a step, and the gradients of all parameters."""
    plan = make_plan(LENGTH, world=world, heads=2, head_dim=8, dtype="float64", schedule="token_ring", layout="zigzag")
    model = model_of(policy, layout).train(training)
    loss = model.loss(shard(tokens_of(), plan), shard(shift_labels(tokens_of()), plan), plan, checkpoint=world == 2)
    loss.backward()
    reduce_gradients(model.parameters())
    return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)


STEPS = [(policy, layout, policy == "gate") for policy in CAUSAL for layout in ("stay", "even")] + [("gate", "stay", False)]


def all_losses_and_gradients(rank: int, world: int) -> list[list]:
    return [[x.numpy() for x in loss_and_gradients(policy, world, layout, training)] for policy, layout, training in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_are_the_same_on_any_number_of_ranks(world):
    """Of every policy; also recomputed (2 ranks), spread evenly, and those of the soft gate with its controller."""
    expected = [loss_and_gradients(policy, 1, "stay", training) for policy, _, training in STEPS]
    for of_rank in run_ranks(world, all_losses_and_gradients, world):
        for step, actual, wanted in zip(STEPS, of_rank, expected, strict=True):
            # A parameter's gradient gathers 82 rows where attention gathers a few dozen keys, through four blocks.
            assert worst(tuple(map(torch.from_numpy, actual)), wanted) < 4 * EXACT, step


def test_the_controller_weighs_deletion_by_the_error_of_its_rate_and_what_has_gathered():
    controller = RateController(target=0.4, kp=0.5, ki=0.01, smooth=0.9)
    p = i = 0.0
    for step in range(50):
        rate = 0.3 + 0.2 * (step / 50)  # too little at first, then too much
        p, i = 0.9 * p + 0.1 * 0.5 * (0.4 - rate), i + 0.01 * (0.4 - rate)
        weight = controller(torch.tensor(rate, dtype=torch.float64)).item()
        assert weight == pytest.approx(p + i, abs=1e-12)
    assert weight < 0  # it asks for rows back
    controller.eval()
    assert controller(torch.tensor(0.9)).item() == weight


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss():
    plan = make_plan(LENGTH, world=1, heads=2, head_dim=8, dtype="float64", schedule="ring")
    losses, grads = [], []
    for weight in (0.0, 3.0):
        model = model_of("gate").train()
        model.controller.eval()
        model.controller.p.fill_(weight)
        loss = model.loss(tokens_of(), shift_labels(tokens_of()), plan)
        loss.backward()
        losses.append(loss.item())
        grads.append(model.gate.bias.grad.item())
    model = model_of("gate").train()
    states = []
    model.layers[0].register_forward_hook(lambda block, args, x: states.append(x))
    model(tokens_of(), plan)
    (slope,) = torch.autograd.grad(model.gate(states[0].detach()).mean(), model.gate.bias)
    assert losses[0] == losses[1]
    assert grads[1] - grads[0] == pytest.approx(3 * slope.item(), rel=1e-9)


def test_a_model_that_deletes_everything_is_the_model_without_its_middle():
    model = model_of("gate")
    torch.nn.init.zeros_(model.gate.weight)
    model.gate.bias.data.fill_(-20.0)
    plan = make_plan(LENGTH, world=1, heads=2, head_dim=8, dtype="float64", schedule="ring")
    actual = model(tokens_of(), plan)
    del model.layers[1:3]
    model.merging = dataclasses.replace(model.merging, first=1, last=1)
    assert torch.equal(actual, model(tokens_of(), plan))


# Bytes


def measured(plan: Plan) -> Counter:
    """What travels in both passes, counted by the transport; it is what the plan predicts."""
    transport = Simulated(plan.world)
    q, k, v = (random(1, n, heads, 8) for n, heads in ((plan.seq_len, 4), (plan.kv_len, 2), (plan.kv_len, 2)))
    simulate(plan, q, k, v, torch.ones_like(q), transport=transport)
    predicted = Counter(traffic(plan)) + Counter(traffic(plan, backward=True))
    assert transport.bytes_sent == predicted
    return predicted


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", ["token_ring", "ring"])
def test_merging_queries_and_keys_by_two_halves_all_bytes(world, schedule):
    plan = make_plan(64, world=world, schedule=schedule, mask=full(), layout="contiguous", **HEADS)
    merge = windows(64, 2)
    short, placement = choose_placement(merge, plan, "auto", 1, LayerCost(), dict(schedule=schedule))
    assert MergedSequence(merge, plan, short, placement, None, 0).is_even  # so that no bias has to travel
    assert measured(plan) == Counter({link: 2 * size for link, size in measured(short).items()})


@pytest.mark.parametrize("world", [2, 4])
def test_merging_keys_alone_halves_the_bytes_of_a_ring_and_none_of_a_token_ring(world):
    """Forward. In backward of a ring dk and dv travel too; in a TokenRing keys never do."""
    for schedule, share in (("ring", 2), ("token_ring", 1)):
        options = dict(world=world, schedule=schedule, mask=full(), layout="contiguous", **HEADS)
        before, after = make_plan(64, **options), make_plan(64, kv_len=32, q_offset=0, **options)
        assert {link: share * size for link, size in traffic(after).items()} == traffic(before)
        measured(after)


def test_unequal_counts_are_spread_when_that_is_cheaper_and_the_plan_notes_it():
    """Nearly all groups are on the first of four ranks; moving them pays, unless they have very many channels."""
    labels = torch.arange(256).where(torch.arange(256) < 64, 64 + (torch.arange(256) - 64) // 64)
    merge, options = Merge.of(labels), dict(heads=4, kv_heads=2, head_dim=8)
    plan = make_plan(256, world=4, mask=full(), schedule="ring", layout="contiguous", **options)
    choices = dict(schedule="ring", topology=Topology("links", "mesh", flops=1e9, bandwidth=1e6))
    dealt, _ = choose_placement(merge, plan, "auto", 1, LayerCost(layers=8), choices)
    left, _ = choose_placement(merge, plan, "auto", 1, LayerCost(dim=1_000_000), choices)
    assert dealt.notes.endswith("spread evenly") and max(dealt.rows(rank) for rank in range(4)) == 17
    assert left.notes.endswith("kept in place") and left.rows(0) == 64


# Mistakes


def test_mistakes_are_named():
    plan = make_plan(24, world=1, schedule="ring", **HEADS)
    short = shorten(windows(24, 2), plan, schedule="ring")
    for message, call in {
        "x has shape \\(1, 23\\).*has \\(1, 24\\)": lambda: short.merge(torch.zeros(1, 23)),
        "how='median'; choose mean, sum or last": lambda: short.merge(torch.zeros(1, 24), "median"),
        "weights has shape \\(24,\\)": lambda: short.merge(torch.zeros(1, 24), weights=torch.ones(24)),
        "y has shape \\(1, 24\\)": lambda: short.unmerge(torch.zeros(1, 24)),
        "merge has 12 rows and the plan 24": lambda: shorten(windows(12, 2), plan),
        "bucket=0": lambda: shorten(windows(24, 2), plan, bucket=0),
        "layout='left'; choose auto, stay or even": lambda: shorten(windows(24, 2), plan, layout="left"),
        "row 8 is merged with a row of another document": lambda: shorten(
            windows(24, 2), make_plan(24, world=1, schedule="ring", mask=documents((0, 9, 24)), **HEADS)
        ),
        "queries and keys of this plan have different layouts": lambda: shorten(
            windows(4, 2), make_plan(4, world=1, kv_len=24, q_offset=20, schedule="ring", **HEADS)
        ),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def error_of_different_merges(rank: int) -> str:
    plan = make_plan(24, world=2, schedule="ring", **HEADS)
    short = shorten(windows(24, 2 + rank), plan, schedule="ring")
    with pytest.raises((MismatchError, InputError)) as raised:
        short.merge(torch.zeros(1, 12, 3))
    return str(raised.value)


def test_different_merges_raise_on_every_rank_before_anything_is_sent():
    actual = run_ranks(2, error_of_different_merges)
    assert actual[0] == actual[1] and "ranks disagree on merge" in actual[0]


# Regressions


def test_a_prefix_does_not_depend_on_later_decisions():
    """Rows of a prefix see all of it at once, so windows may not reach beyond it; the decoder restarts them there."""
    plan = make_plan(LENGTH, world=1, heads=2, head_dim=8, dtype="float64", schedule="ring", mask=prefix_lm(14))
    merge = similar(random(2, LENGTH, 8), plan.layout, window=8, remove=0.5)
    with pytest.raises(InputError, match="let windows restart where the mask changes"):
        shorten(merge, plan, schedule="ring")
    for policy in ("similar", "windows", "words", "gate"):
        actual = first_difference(policy, 1, prefix_lm(14))
        assert all(first >= (changed if changed >= 14 else 0) for changed, first in actual.items()), policy


def test_packed_documents_are_found_in_any_mask_that_has_them():
    packed = documents((0, 9, 24)) & prefix_lm(4)
    with pytest.raises(InputError, match="row 8 is merged with a row of another document"):
        shorten(windows(24, 2), make_plan(24, world=1, schedule="ring", mask=packed, **HEADS), schedule="ring")
    apart = documents((0, 12, 24), causal=False)
    plan = make_plan(24, world=1, schedule="ring", mask=apart, **HEADS)
    with pytest.raises(InputError, match="hides keys from some rows"):
        shorten(bipartite(random(1, 24, 8), plan.layout, remove=0.1), plan, schedule="ring")


def test_a_composition_is_not_ready_before_its_parts():
    first = Merge.of(torch.tensor([[0, 1, 2, -1, -1, -1]]))
    other = Merge.of(torch.tensor([[0, 1, 2, -1, 4, -1]]))
    a, b = first.then(windows(3, 2)), other.then(windows(4, 2))
    assert a.latest.tolist()[0] == [-1, 0, 0, 0, 0, 0]  # its second window is never full
    assert b.latest.tolist()[0] == [-1, 0, 0, 0, 1, 1]
    late = Merge.of(torch.tensor([[0, 1, 2, 3]]), decided=torch.tensor([[3, 1, 2, 3]]))
    assert late.ready.tolist() == [[3, 3, 3, 3]]  # row 1 would reveal the merging of row 0


@torch.no_grad()
def test_results_do_not_depend_on_the_length_of_the_sequence():
    """A model on the first rows gives what the model on all of them gives there."""
    for policy in CAUSAL:
        model = model_of(policy)
        actual = []
        for length in (LENGTH, 30):
            plan = make_plan(length, world=1, heads=2, head_dim=8, dtype="float64", schedule="ring")
            actual.append(model(tokens_of()[:, :length], plan)[:, :30])
        assert (actual[0] - actual[1]).abs().max() < EXACT, policy


def test_a_bidirectional_window_shows_no_group_before_it_is_ready():
    mask = documents((0, 8), causal=False) & sliding_window(4, 4)
    late = Merge.of(torch.tensor([0, 0, 2, 2, 4, 4, 6, 6]), decided=torch.tensor([1, 1, 3, 3, 7, 7, 7, 7]))
    with pytest.raises(InputError, match="the group at row 5 is ready at row 7"):
        shorten(late, make_plan(8, world=1, schedule="ring", mask=mask, **HEADS), schedule="ring")
    whole = make_plan(7, world=1, schedule="ring", mask=prefix_lm(7), **HEADS)  # whose prefix is all there is
    assert shorten(windows(7, 2), whole, schedule="ring").plan.seq_len == 4
