"""A decoder whose middle runs on a shorter sequence: rows are merged before some block and unmerged behind a later one.

    x ──blocks──┬─────────────────────────────────────────────────┬─(+)──blocks── loss, at every row
                └─merge── y ──blocks on groups── y' ── y' - y ──unmerge─┘

What the middle adds to a group is added to its rows; under a causal mask, to the rows from where the group is ready on, so that
no row is told of what comes after it. Labels stay where they are, rotary positions are those of each group's last row, and keys
weigh as many rows as they stand for.

With the delete gate (`policy="gate"`) the middle runs on all rows in training, faded by the gate, and on those that are left in
evaluation; a deleted row passes the middle by. Shape: Nawrot et al. 2021, https://arxiv.org/abs/2110.13711 (hourglass), whose
shift this generalises; MergeDNA, https://arxiv.org/abs/2511.14806.
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
    """What `MergingDecoder` merges, and where. Checked when the decoder is made.

    policy: one of `ringattn.merging.POLICIES`. "windows" of `factor` rows; "similar" rows inside windows of `window`;
        "bipartite": similar rows of the whole sequence, not causal; "words": up to and with a token of `ends`; "gate": what a
        learned gate deletes.
    first, last: blocks [first, last) run on the short sequence.
    factor: rows in a window of "windows".
    window: rows in a window of "similar".
    remove: share of rows that merge into others ("similar", "bipartite", up to 0.5), or that the gate shall delete.
    threshold: cosine above which rows merge ("similar", "bipartite"); then `remove` is the most there may be.
    scorer: who may merge ("similar", "bipartite"): "alternate", "energy" or "random".
    ends: tokens that end a word.
    how: "mean" of a group's rows, the "last" of them, or "learned": a mean weighed by the rows themselves.
    size_bias: whether keys weigh as many rows as were merged into them.
    protect: so many rows at the start of the sequence stay alone.
    layout, bucket: see `shorten`; bucket only where counts depend on data.
    schedule, topology: of attention over groups, for `make_plan`. Where counts depend on data there are many plans: "auto"
        takes seconds for each, a name milliseconds.
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
        """Raise `InputError` for what cannot work."""
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
            raise InputError(f'policy="{self.policy}" deletes rows and means nothing: leave out protect and how')


class MergingDecoder(Decoder):
    """`Decoder` with `Merging`. The same parameters and, for the gate and the learned mean, a few more.

    `short` is what the last pass has merged: its plan and, for each group, sizes and positions; None where nothing was.
    """

    def __init__(self, config: DecoderConfig, merging: Merging) -> None:
        instance("config", config, DecoderConfig, InputError, "give a DecoderConfig")
        instance("merging", merging, Merging, InputError, "give a Merging(policy, first, last, ...)").check(config)
        super().__init__(config)
        self.merging, self._policy = merging, POLICIES[merging.policy]
        self.short: MergedSequence | None = None
        self._kept: dict[object, MergedSequence] = {}
        self._gates: Tensor | None = None
        if self._policy.deletes:
            self.gate, self.controller = DeleteGate(config.dim), RateController(merging.remove)
        if merging.how == "learned":
            self.weigh = nn.Linear(config.dim, 1, bias=False)
            nn.init.zeros_(self.weigh.weight)  # at first the plain mean

    def loss(
        self, tokens: Tensor, targets: Tensor, plan: Plan, group: Group | None = None, *, checkpoint: bool = False
    ) -> Tensor:
        """As `Decoder.loss`. In training the gate's weight times its mean is in the gradient and not in the value."""
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

    def _blocks(self, x: Tensor, through: BlockArgs) -> Tensor:
        m, blocks = self.merging, list(self.layers)
        x = through(blocks[: m.first], x)
        x = (self._faded if self._policy.deletes and self.training else self._merged)(x, blocks[m.first : m.last], through)
        return through(blocks[m.last :], x)

    def _faded(self, x: Tensor, middle: list[nn.Module], through: BlockArgs) -> Tensor:
        """The soft gate: a row weighs less as a key, and takes less of what the middle makes of it."""
        g = self._gates = self.gate(x)
        self.short = None
        added: Tensor = self._share(g, x) * (through._replace(key_bias=g)(middle, x) - x)
        return x + added

    def _share(self, g: Tensor, x: Tensor) -> Tensor:
        """How much of the middle a row takes: 1 if it is kept, 0 if it is deleted."""
        share: Tensor = (1 + g / self.gate.scale).to(x.dtype).unsqueeze(-1)
        return share

    def _merged(self, x: Tensor, middle: list[nn.Module], through: BlockArgs) -> Tensor:
        m = self.merging
        g = self.gate(x) if self._policy.deletes else None
        short = self.short = self._shortened(x, g, through)
        weights = (10 * torch.tanh(self.weigh(x) / 10)).exp().squeeze(-1) if m.how == "learned" else None
        y = short.merge(x, "last" if m.how == "last" or g is not None else "mean", weights)
        bias = None if short.is_even and g is None else short.key_bias
        if bias is not None and not m.size_bias:
            bias = bias.clamp(max=0)  # of what is there 0, of empty slots still -inf
        if g is not None:
            bias = short.merge(g, "last") + short.key_bias.to(g.dtype)
        short_way = through._replace(positions=short.positions, plan=short.plan, key_bias=bias)
        added = short.unmerge(short_way(middle, y) - y)
        if g is not None:  # what is deleted passes by, and so gets nothing of the group before it
            added = added * self.gate.keeps(g).unsqueeze(-1) * self._share(g, x)
        return x + added

    def _shortened(self, x: Tensor, g: Tensor | None, through: BlockArgs) -> MergedSequence:
        m, plan, group = self.merging, through.plan, through.group
        key = (plan, len(x), x.device, group)
        if key in self._kept:
            return self._kept[key]
        config, static = self.config, self._policy.static
        heads = config.heads + config.kv_heads
        pay = LayerCost(
            m.last - m.first, len(x), config.dim, 2.0 * config.dim * (2 * heads * config.head_dim + 3 * config.hidden_dim)
        )
        merge, choices = self._merge(x, g, through), dict(schedule=m.schedule, topology=m.topology)
        short = shorten(merge, plan, group=group, layout=m.layout, bucket=1 if static else m.bucket, pay=pay, **choices)
        if static:
            self._kept = {key: short}
        return short

    def _merge(self, x: Tensor, g: Tensor | None, through: BlockArgs) -> Merge:
        m = self.merging
        request = MergeRequest(
            x,
            through.tokens,
            through.positions,
            through.plan,
            through.group,
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
        """Keys of the first block behind, averaged over heads: (batch, rows, head_dim)."""
        block = self.layers[self.merging.first]
        assert isinstance(block, Block)
        keys: Tensor = block.self_attn.k_proj(block.input_layernorm(x))
        metric: Tensor = keys.unflatten(-1, (-1, self.config.head_dim)).float().mean(-2)
        return metric
