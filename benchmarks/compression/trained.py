r"""Small models trained from scratch at equal compute, with and without merging: what merging buys or costs once it is learned.

    OMP_NUM_THREADS=1 python benchmarks/compression/trained.py
    OMP_NUM_THREADS=1 python benchmarks/compression/trained.py --task masked --seq-len 512 \
        --variants none "windows 2" similar "similar, energy" bipartite --json masked.json --plot masked.png

`next` predicts the next byte of the main job's text; `masked` reconstructs masked bytes from both sides, or masked bases of a
genome (`--data genome.fa`), with local windows merged and unmerged, as MergeDNA does (https://arxiv.org/abs/2511.14806). Every
run ends when it has used the floating-point operations that the model without merging needs for `--steps` steps: they are
counted in closed form, forward and twice that backward, with the short plan where the sequence is short. Each finished run is a
line of `--json`, so that an interrupted job goes on. Evaluated on text that is never trained on.

Bytes are those that the busiest of 4 ranks would send in attention by TokenRing, counted from the plan. Wall time is that of
one core beside whatever else the machine does. What this does not show: what becomes of it in large models and long training.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringattn import Plan, causal, full, make_plan
from ringattn.cli.train import read_corpus
from ringattn.nn import Decoder, DecoderConfig, Merging, MergingDecoder, shift_labels
from ringattn.plan import pairs
from ringattn.planner import traffic

MERGED = dict(first=1, last=3, schedule="ring")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "windows 2": dict(policy="windows", factor=2),
    "similar": dict(policy="similar", window=16, remove=0.5),
    "gate": dict(policy="gate", remove=0.5),
    "windows 2, last": dict(policy="windows", factor=2, how="last"),
    "windows 2, learned": dict(policy="windows", factor=2, how="learned"),
    "similar, energy": dict(policy="similar", window=16, remove=0.5, scorer="energy"),
    "bipartite": dict(policy="bipartite", remove=0.5),
}
BASES = {ord(c): n for n, c in enumerate("ACGT")}


@dataclass(frozen=True)
class Config:
    """What to train."""

    task: Literal["next", "masked"] = "next"
    data: tuple[Path, ...] = ()
    """Text, or one FASTA file (.fa); by default the Python standard library's own sources."""
    variants: tuple[str, ...] = ("none", "windows 2", "similar", "gate")
    seeds: int = 3
    steps: int = 120
    """Of the model without merging: its operations are everyone's budget."""
    seq_len: int = 1024
    lr: float = 4e-3
    json: Path = Path("benchmarks/results/compression_trained.json")
    plot: Path = Path("docs/images/compression_trained.png")

    @property
    def genome(self) -> bool:
        return any(path.suffix == ".fa" for path in self.data)

    @property
    def symbols(self) -> int:
        """Bytes or bases; one more stands where a symbol is to be found."""
        return 4 if self.genome else 256


def main(config: Config) -> None:
    done = [json.loads(line) for line in config.json.read_text().splitlines()] if config.json.exists() else []
    for seed in range(config.seeds):
        for variant in config.variants:
            if not any((run["variant"], run["seed"]) == (variant, seed) for run in done):
                done.append(trained(config, variant, seed))
                with config.json.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    report(config, [run for run in done if run["variant"] in config.variants])


def trained(config: Config, variant: str, seed: int) -> dict[str, Any]:
    """One run: its curve, and what it has cost."""
    shape = DecoderConfig(config.symbols + (config.task == "masked"), 128, 4, 4, 4, 32, 384)
    plan = _plan(config.seq_len, config.task, 1)
    torch.manual_seed(seed)
    how = VARIANTS[variant]
    model = Decoder(shape) if how is None else MergingDecoder(shape, Merging(**{**how, **MERGED}))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    text, held_out = _text(config)
    budget = config.steps * step_flops(shape, plan, None, None)
    spent, curve, step, sent = 0.0, [], 0, 0
    begin, cpu = time.perf_counter(), time.process_time()
    while spent < budget:
        step += 1
        tokens, targets = _example(text, config, seed, step)
        loss = model.loss(tokens, targets, plan)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(step / 20, math.sqrt(20 / step))
        optimizer.step()
        short = model.short.plan if isinstance(model, MergingDecoder) and model.short else None
        spent += step_flops(shape, plan, short, how)
        sent += _sent(config, shape, short)
        if step % 20 == 0 or spent >= budget:
            now = dict(step=step, flops=spent, seconds=time.perf_counter() - begin, cpu=time.process_time() - cpu, sent=sent)
            bits, kept = _evaluated(model, held_out, config, plan)
            curve.append(now | dict(bits=bits))
            begin += time.perf_counter() - begin - now["seconds"]  # evaluation costs nothing
            cpu += time.process_time() - cpu - now["cpu"]
    short = model.short.plan if isinstance(model, MergingDecoder) and model.short else None
    used = step_flops(shape, plan, short, how) / step_flops(shape, plan, None, None)
    print(variant, seed, curve[-1], f"evaluation needs {used:.2f} of the operations, {kept:.2f} of the rows", flush=True)
    return dict(variant=variant, seed=seed, curve=curve, evaluation_flops=used, kept=kept)


def step_flops(shape: DecoderConfig, plan: Plan, short: Plan | None, how: dict[str, Any] | None) -> float:
    """Of one step on one sequence: a forward pass and twice that for backward; choosing what merges has no backward."""
    dense = 2 * shape.dim * (2 * (shape.heads + shape.kv_heads) * shape.head_dim + 3 * shape.hidden_dim)
    blocks = [plan] * 4 if short is None else [plan, short, short, plan]
    forward = sum(dense * p.seq_len + 4 * shape.head_dim * sum(pairs(p.forward).values()) for p in blocks)
    forward += 2 * shape.dim * shape.vocab_size * plan.seq_len
    choosing = 0.0
    if how and how["policy"] in ("similar", "bipartite"):
        others = how["window"] if how["policy"] == "similar" else plan.seq_len // 4  # of N/2 rows against N/2
        choosing = (
            2.0 * shape.head_dim * plan.seq_len * others + 2.0 * shape.dim * shape.kv_heads * shape.head_dim * plan.seq_len
        )
    return 3.0 * forward + choosing


def _sent(config: Config, shape: DecoderConfig, short: Plan | None) -> int:
    """Bytes that the busiest of 4 ranks sends in the attention of one step."""
    whole = _busiest(_plan(config.seq_len, config.task, 4))
    middle = whole if short is None else _busiest(_plan(short.seq_len, config.task, 4))
    return 2 * whole + 2 * middle


def _busiest(plan: Plan) -> int:
    sent: Counter[int] = Counter()
    for backward in (False, True):
        for (src, _), size in traffic(plan, backward=backward).items():
            sent[src] += size
    return max(sent.values())


def _plan(seq_len: int, task: str, world: int) -> Plan:
    mask = causal() if task == "next" else full()
    schedule = "token_ring" if world > 1 else "ring"
    return make_plan(seq_len, world=world, heads=4, head_dim=32, mask=mask, schedule=schedule, topology="cpu")


def _text(config: Config) -> tuple[Tensor, Tensor]:
    """What is trained on, and the last twentieth, which is not."""
    if not config.genome:
        text = read_corpus(config.data).long()
    else:
        (fasta,) = config.data
        lines = fasta.read_text().splitlines()
        letters = "".join(line for line in lines if not line.startswith(">")).upper().encode()
        text = torch.tensor([BASES[c] for c in letters if c in BASES])
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def _example(text: Tensor, config: Config, seed: int, step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1000003 * seed + step)
    start = int(torch.randint(len(text) - config.seq_len, (), generator=source))
    return _posed(text[None, start : start + config.seq_len], config, source)


def _posed(tokens: Tensor, config: Config, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets; for `masked` 15 % of the symbols are hidden, and only these are asked for."""
    if config.task == "next":
        return tokens, shift_labels(tokens)
    hidden = torch.rand(tokens.shape, generator=source) < 0.15
    return tokens.masked_fill(hidden, config.symbols), tokens.masked_fill(~hidden, -100)


@torch.no_grad()
def _evaluated(model: Decoder, text: Tensor, config: Config, plan: Plan, count: int = 16) -> tuple[float, float]:
    """Bits per byte or base and the share of rows kept, over windows of the text that is held out. Gates are hard here."""
    model.eval()
    starts = torch.linspace(0, len(text) - config.seq_len, count).long().tolist()
    losses, kept = [], []
    for n, start in enumerate(starts):
        asked = _posed(text[None, start : start + config.seq_len], config, torch.Generator().manual_seed(n))
        losses.append(model.loss(*asked, plan).item() / math.log(2))
        short = model.short if isinstance(model, MergingDecoder) else None
        kept.append(sum(short.groups.counts) / config.seq_len if short else 1.0)
    model.train()
    return mean(losses), mean(kept)


def report(config: Config, runs: list[dict[str, Any]]) -> None:
    table = Table(title=f"{config.task}, {config.seq_len} tokens, the operations of {config.steps} steps without merging")
    for name in ("variant", "bits", "steps", "CPU seconds", "MB sent", "operations in evaluation", "rows kept"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for variant in config.variants:
        own = [run for run in runs if run["variant"] == variant]
        if not own:
            continue
        ends = [run["curve"][-1] for run in own]
        bits = [end["bits"] for end in ends]
        spread = f" ± {stdev(bits):.3f}" if len(bits) > 1 else ""
        table.add_row(
            variant,
            f"{mean(bits):.3f}{spread}",
            f"{mean(end['step'] for end in ends):.0f}",
            f"{mean(end['cpu'] for end in ends):.0f}",
            f"{mean(end['sent'] for end in ends) / 1e6:.0f}",
            f"{mean(run['evaluation_flops'] for run in own):.2f}",
            f"{mean(run['kept'] for run in own):.2f}",
        )
    Console(width=120).print(table)
    draw(config, runs)


def draw(config: Config, runs: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    colors = ["#222222", "#1b6ca8", "#d1495b", "#5b8c5a", "#b8860b", "#7b4b94", "#4c9f9f", "#a0522d"]
    units = (("flops", 1e12, "10^12 operations"), ("cpu", 1, "CPU seconds"), ("sent", 1e6, "MB sent by the busiest of 4 ranks"))
    for axis, (name, unit, label) in zip(axes, units, strict=True):
        for color, variant in zip(colors, config.variants, strict=False):
            for number, run in enumerate(r for r in runs if r["variant"] == variant):
                points = [(p[name] / unit, p["bits"]) for p in run["curve"]]
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.3, alpha=0.8, label=None if number else variant)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("bits per base" if config.genome else "bits per byte")
    axes[0].legend(frameon=False)
    figure.savefig(config.plot, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Config))
