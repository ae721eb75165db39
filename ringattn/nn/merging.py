"""Runs the middle blocks of a decoder on a shorter sequence: rows are merged before a block and unmerged after a later one.

    x ──blocks──┬─────────────────────────────────────────────────┬─(+)──blocks── loss, at every row
                └─merge── y ──blocks on groups── y' ── y' - y ──unmerge─┘

What the middle adds to a group is added to its rows; under a causal mask, to the rows from the position on at which the group
is ready, so no row depends on later ones. Labels are unchanged, rotary positions are those of each group's last row, and keys
are weighted by the number of rows they represent.

With the delete gate (`policy="gate"`) the middle runs in training on all rows, attenuated by the gate, and in evaluation on the
kept rows; a deleted row bypasses the middle. Architecture: Nawrot et al. 2021, https://arxiv.org/abs/2110.13711 (hourglass),
whose shift this generalises; MergeDNA, https://arxiv.org/abs/2511.14806.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ringattn._validation import as_finite_float, as_int, count, counts, flag, instance, one_of, short_repr
from ringattn.comm.process_group import Group, group_and_rank
from ringattn.errors import InputError
from ringattn.merging import POLICIES, DeleteGate, LayerCost, Merge, MergedSequence, MergeRequest, RateController, shorten
from ringattn.merging.policy_inputs import SCORERS
from ringattn.nn.collectives import sum_over
from ringattn.nn.config import DecoderConfig
from ringattn.nn.decoder import Block, BlockArgs, Decoder
from ringattn.plan.plan import Plan
from ringattn.planner.topology import Topology


@dataclass(frozen=True)
class Merging:
    """Configures what `MergingDecoder` merges, and where. Validated by the decoder's constructor.

    policy: one of `ringattn.merging.POLICIES`. "windows" of `factor` rows; "similar" rows inside windows of `window`;
        "bipartite": similar rows of the whole sequence, not causal; "words": up to and including a token of `ends`; "gate":
        rows that a learned gate deletes.
    first, last: blocks [first, last) run on the short sequence.
    factor: rows in a window of "windows".
    window: rows in a window of "similar".
    remove: share of rows that merge into others ("similar", "bipartite", up to 0.5), or the target share that the gate deletes.
    threshold: cosine above which rows merge ("similar", "bipartite"); then `remove` is the maximum share.
    scorer: who may merge ("similar", "bipartite"): "alternate", "energy" or "random".
    ends: tokens that end a word.
    how: "mean" of a group's rows, the "last" of them, or "learned": a weighted mean with learned weights.
    size_bias: whether keys are weighted by the number of rows merged into them.
    protect: this many rows at the start of the sequence are not merged.
    layout, bucket: see `shorten`; bucket only where counts depend on data.
    schedule, topology: of attention over groups, for `make_plan`. Where counts depend on data there are many plans: "auto"
        takes seconds for each, a named schedule milliseconds.
    """

    policy: str
    first: int
    last: int
    factor: int = 2
    window: int = 16
    remove: float = 0.5
    threshold: float | None = None
    scorer: Literal["alternate", "energy", "random"] = "alternate"
    ends: tuple[int, ...] = (9, 10, 32)
    how: Literal["mean", "last", "learned"] = "mean"
    size_bias: bool = True
    protect: int = 0
    layout: Literal["auto", "stay", "even"] = "auto"
    bucket: int = 64
    schedule: str = "auto"
    topology: Topology | str | None = None
    seed: int = 0

    def check(self, config: DecoderConfig) -> None:
        """Raises `InputError` for invalid values."""
        one_of("policy", self.policy, POLICIES, InputError)
        for name in ("first", "last", "protect", "factor", "window", "bucket", "seed"):
            as_int(name, getattr(self, name), InputError)
        flag("size_bias", self.size_bias, InputError)
        counts("ends", self.ends, InputError)
        one_of("layout", self.layout, ("auto", "stay", "even"), InputError)
        one_of("scorer", self.scorer, SCORERS, InputError)
        if self.threshold is not None and (as_finite_float(self.threshold) is None or not -1 <= self.threshold <= 1):
            raise InputError(f"threshold={short_repr(self.threshold)}: is a cosine, from -1 to 1")
        if not 0 <= self.first < self.last <= config.layers:
            raise InputError(
                f"first={short_repr(self.first)}, last={short_repr(self.last)}: blocks [first, last) must be "
                f"some of the {config.layers}"
            )
        one_of("how", self.how, ("mean", "last", "learned"), InputError)
        if self.protect < 0:
            raise InputError(f"protect={short_repr(self.protect)}: counts rows, 0 or more")
        if not 0 < (as_finite_float(self.remove) or 0) < 1 or (POLICIES[self.policy].pairs and self.remove > 0.5):
            raise InputError(
                f"remove={short_repr(self.remove)}: is a share of rows, more than 0, less than 1, up to 0.5 where rows "
                "are merged"
            )
        count("protect", self.protect, InputError, least=0)
        for name in ("factor", "window", "bucket"):
            count(name, getattr(self, name), InputError, hint="it counts rows")
        if POLICIES[self.policy].deletes and (self.protect or self.how != "mean"):
            raise InputError(f'policy="{self.policy}" deletes rows and computes no means: leave out protect and how')


class MergingDecoder(Decoder):
    """A `Decoder` with `Merging`. It has the same parameters and a few more for the gate and the learned mean.

    `short` is the merged sequence of the last pass (plan, sizes, positions of the groups), None where nothing was merged.
    """

    def __init__(self, config: DecoderConfig, merging: Merging) -> None:
        instance("config", config, DecoderConfig, InputError, "give a DecoderConfig")
        instance("merging", merging, Merging, InputError, "give a Merging(policy, first, last, ...)").check(config)
        super().__init__(config)
        self.merging, self._policy = merging, POLICIES[merging.policy]
        self.short: MergedSequence | None = None
        self._static_merges: dict[object, MergedSequence] = {}
        self._gates: Tensor | None = None
        if self._policy.deletes:
            self.gate, self.controller = DeleteGate(config.dim), RateController(merging.remove)
        if merging.how == "learned":
            self.weigh = nn.Linear(config.dim, 1, bias=False)
            nn.init.zeros_(self.weigh.weight)  # the plain mean at first

    def loss(
        self, tokens: Tensor, targets: Tensor, plan: Plan, group: Group | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """As `Decoder.loss`. In training the gate's penalty contributes to the gradient and not to the value."""
        value = super().loss(tokens, targets, plan, group, checkpoint=checkpoint)
        if self._gates is None:
            return value
        gates, self._gates = self._gates, None
        rows = len(gates) * plan.seq_len
        process_group, _ = group_and_rank(group, plan.world)
        deleted = sum_over(process_group, (~self.gate.keeps(gates)).sum().double(), "deleted rows")
        penalty = self.controller(deleted / rows) * gates.sum() / rows  # this rank's share of the mean over all
        with_penalty: Tensor = value + (penalty - penalty.detach()).to(value.dtype)
        return with_penalty

    def _blocks(self, x: Tensor, block_args: BlockArgs) -> Tensor:
        m, blocks = self.merging, list(self.layers)
        x = block_args(blocks[: m.first], x)
        x = (self._soft_gated if self._policy.deletes and self.training else self._merged)(
            x, blocks[m.first : m.last], block_args
        )
        return block_args(blocks[m.last :], x)

    def _soft_gated(self, x: Tensor, middle: list[nn.Module], block_args: BlockArgs) -> Tensor:
        """Runs the middle with the soft gate: a row has less weight as a key and takes less of the middle's output."""
        g = self._gates = self.gate(x)
        self.short = None
        added: Tensor = self._share(g, x) * (block_args._replace(key_bias=g)(middle, x) - x)
        return x + added

    def _share(self, g: Tensor, x: Tensor) -> Tensor:
        """The share of the middle's output that a row takes: 1 if it is kept, 0 if it is deleted."""
        share: Tensor = (1 + g / self.gate.scale).to(x.dtype).unsqueeze(-1)
        return share

    def _merged(self, x: Tensor, middle: list[nn.Module], block_args: BlockArgs) -> Tensor:
        m = self.merging
        g = self.gate(x) if self._policy.deletes else None
        short = self.short = self._shorten(x, g, block_args)
        weights = (10 * torch.tanh(self.weigh(x) / 10)).exp().squeeze(-1) if m.how == "learned" else None
        y = short.merge(x, "last" if m.how == "last" or g is not None else "mean", weights)
        bias = None if short.is_even and g is None else short.key_bias
        if bias is not None and not m.size_bias:
            bias = bias.clamp(max=0)  # 0 for groups, still -inf for empty slots
        if g is not None:
            bias = short.merge(g, "last") + short.key_bias.to(g.dtype)
        short_args = block_args._replace(positions=short.positions, plan=short.plan, key_bias=bias)
        added = short.unmerge(short_args(middle, y) - y)
        if g is not None:  # a deleted row bypasses the middle and gets nothing of the group before it
            added = added * self.gate.keeps(g).unsqueeze(-1) * self._share(g, x)
        return x + added

    def _shorten(self, x: Tensor, g: Tensor | None, block_args: BlockArgs) -> MergedSequence:
        m, plan, group = self.merging, block_args.plan, block_args.group
        key = (plan, len(x), x.device, group)
        if key in self._static_merges:
            return self._static_merges[key]
        config, static = self.config, self._policy.static
        heads = config.heads + config.kv_heads
        cost = LayerCost(
            m.last - m.first, len(x), config.dim, 2.0 * config.dim * (2 * heads * config.head_dim + 3 * config.hidden_dim)
        )
        merge, choices = self._merge(x, g, block_args), dict(schedule=m.schedule, topology=m.topology)
        short = shorten(merge, plan, group=group, layout=m.layout, bucket=1 if static else m.bucket, cost=cost, **choices)
        if static:
            self._static_merges = {key: short}
        return short

    def _merge(self, x: Tensor, g: Tensor | None, block_args: BlockArgs) -> Merge:
        m = self.merging
        request = MergeRequest(
            x,
            block_args.tokens,
            block_args.positions,
            block_args.plan,
            block_args.group,
            self._metric,
            None if g is None else self.gate.keeps(g),
            m.factor,
            m.window,
            m.remove,
            m.threshold,
            m.scorer,
            m.ends,
            m.protect,
            m.seed,
            m.first,
        )
        merge = self._policy.decide(request)
        return instance(f"policy {m.policy!r} returned", merge, Merge, InputError, "return a Merge, as windows(...) makes one")

    @torch.no_grad()
    def _metric(self, x: Tensor) -> Tensor:
        """Keys of the first middle block, averaged over heads: (batch, rows, head_dim)."""
        block = self.layers[self.merging.first]
        assert isinstance(block, Block)
        keys: Tensor = block.self_attn.k_proj(block.input_layernorm(x))
        metric: Tensor = keys.unflatten(-1, (-1, self.config.head_dim)).float().mean(-2)
        return metric
