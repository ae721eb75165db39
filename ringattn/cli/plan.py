"""`ringattn plan`: shows what every plan for one attention layer would cost, and which one make_plan takes, without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from ringattn._validation import path
from ringattn.cli.terminal import console
from ringattn.errors import PlanError
from ringattn.plan.plan import Plan
from ringattn.planner import Candidate, candidates, make_plan
from ringattn.planner.closed_form import rank_families
from ringattn.planner.request import request
from ringattn.planner.topology import PRESETS, Topology, load_topology
from ringattn.sequence.mask import Mask, causal, documents, full, prefix_lm, sliding_window

MANY = 64  # ranks above which pricing each rank by itself takes too long
MOST_LINES = 100  # of the schedule as text


def plan(
    seq_len: Annotated[int, tyro.conf.Positional],
    *,
    world: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "float32",
    mask: str = "causal",
    schedule: str = "auto",
    layout: str = "auto",
    ulysses: int | None = None,
    kernel: str = "auto",
    topology: str | None = None,
    buffer_limit: int | None = None,
    training: bool = True,
    kv_len: int | None = None,
    q_offset: int | None = None,
    partials: str = "auto",
    draw: Path | None = None,
    draw_pass: Literal["forward", "backward"] = "forward",
    top: int = 12,
) -> None:
    """Price every plan for one attention layer with a batch of 1, and show the one that make_plan chooses.

    Above 64 ranks and with schedule auto, closed forms price whole families instead, and no plan is made.

    Args:
        seq_len: Tokens in the whole sequence.
        world: Number of ranks.
        heads: Query heads of the whole model.
        kv_heads: Key and value heads; by default as many as heads.
        head_dim: Of q, k and v.
        dtype: float32, float64, bfloat16 or float16.
        mask: full, causal, window:LEFT[,RIGHT], documents:0,END,END,.. or prefix:LENGTH; several joined with &.
        schedule: auto, balanced, or a name from ringattn.schedule.NAMES, such as ring or token_ring.
        layout: auto, contiguous, zigzag, striped or documents.
        ulysses: Ranks that trade sequence for heads; divides world.
        kernel: auto, a name from ringattn.plan.KERNELS, such as flash or flash3:sm_margin=8, or emulated:FLOPS.
        topology: A preset's name, or a file that probe wrote.
        buffer_limit: Bytes that a rank may hold beyond its own rows.
        training: Whether backward counts in the choice.
        kv_len: Keys in the whole sequence; by default as many as queries.
        q_offset: Position of the first query among the keys.
        partials: auto, wide or narrow: what partial sums travel in.
        draw: Write a picture of the chosen schedule to this SVG file.
        draw_pass: Which pass to draw.
        top: Rows of the table.
    """
    from ringattn.schedule.draw import draw_svg, draw_text

    arguments: dict[str, Any] = {
        "world": world,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "mask": _mask(mask),
        "schedule": schedule,
        "layout": layout,
        "ulysses": ulysses,
        "kernel": kernel,
        "topology": _topology(topology),
        "buffer_limit": buffer_limit,
        "training": training,
        "kv_len": kv_len,
        "q_offset": q_offset,
        "partials": partials,
    }
    if world > MANY and schedule == "auto":
        console().print(_families(seq_len, arguments, top))
        return
    chosen = make_plan(seq_len, **arguments)
    out = console()
    out.print(_comparison(candidates(seq_len, **arguments), chosen, top))
    out.print(str(chosen), markup=False, highlight=False)
    backward = draw_pass == "backward"
    head_groups = chosen.backward if backward else chosen.forward
    drawn, areas = [group.schedule for group in head_groups], [group.areas for group in head_groups]
    text = draw_text(drawn, areas=areas, backward=backward)
    if text.count("\n") > MOST_LINES:
        text = f"{text.splitlines()[0]}\n(too long to print step by step; --draw FILE.svg draws it)"
    out.print(text, markup=False, highlight=False, soft_wrap=True)
    if draw is not None:
        path("--draw", draw, PlanError)
        try:
            draw.write_text(draw_svg(drawn, backward=backward))
        except OSError as error:
            raise PlanError(f"--draw {draw} cannot be written ({error}); give another path") from error
        out.print(f"drawn to {draw}", markup=False, highlight=False)


def _comparison(priced: list[Candidate], chosen: Plan, top: int) -> Table:
    title = f"{len(priced)} candidates on {priced[0].topology.name}, fastest first; chosen: F forward, B backward"
    table = Table(title=title, title_justify="left")
    for name in ("", "schedule", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("forward ms", "backward ms", "busiest link MB", "in backward", "all links GB", "buffers MB"):
        table.add_column(name, justify="right")
    for n, candidate in enumerate(priced):
        mark = _mark(candidate, chosen)
        if n < top or mark:
            forward, backward = candidate.cost(backward=False), candidate.cost(backward=True)
            table.add_row(
                mark,
                str(candidate.named),
                str(candidate.plan.layout),
                f"{forward.seconds * 1e3:.4g}",
                f"{backward.seconds * 1e3:.4g}",
                f"{forward.link_bytes / 1e6:.4g}",
                f"{backward.link_bytes / 1e6:.4g}",
                f"{(forward.total_bytes + backward.total_bytes) / 1e9:.4g}",
                f"{max(forward.buffer_bytes, backward.buffer_bytes) / 1e6:.4g}",
            )
    return table


def _families(seq_len: int, arguments: dict[str, Any], top: int) -> Table:
    """Families of plans, priced by closed form; each row says what make_plan takes as schedule and ulysses."""
    special = ("ulysses", "buffer_limit", "kv_len", "q_offset")
    if any(arguments[name] is not None for name in special) or arguments["partials"] != "auto":
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in (*special, "partials"))
        raise PlanError(f"{flags} need a schedule by name above {MANY} ranks: add --schedule")
    asked = request(seq_len=seq_len, **arguments)
    same = {name: getattr(asked, name) for name in ("world", "heads", "kv_heads", "head_dim", "dtype", "mask", "topology")}
    layout = "zigzag" if arguments["layout"] == "auto" else arguments["layout"]
    families = rank_families(seq_len, **same, layout=layout)
    if not arguments["training"]:
        families.sort(key=lambda family: family.forward.seconds)
    table = Table(title=f"{len(families)} families on {asked.topology.name}, {layout}, by closed form", title_justify="left")
    table.add_column("family", no_wrap=True)
    for name in ("forward ms", "backward ms", "busiest link MB", "all links GB", "buffers MB"):
        table.add_column(name, justify="right")
    for family in families[:top]:
        seconds = (f"{cost.seconds * 1e3:.4g}" for cost in (family.forward, family.backward))
        total = (family.forward.total_bytes + family.backward.total_bytes) / 1e9
        link = max(family.forward.link_bytes, family.backward.link_bytes) / 1e6
        table.add_row(str(family.family), *seconds, f"{link:.4g}", f"{total:.4g}", f"{family.buffer_bytes / 1e6:.4g}")
    return table


def _mark(candidate: Candidate, chosen: Plan) -> str:
    if candidate.plan.layout != chosen.layout:
        return ""
    passes = (("F", chosen.forward, candidate.plan.forward), ("B", chosen.backward, candidate.plan.backward))
    return "".join(mark for mark, a, b in passes if [group.schedule for group in a] == [group.schedule for group in b])


def _mask(text: str) -> Mask:
    """The mask that a command line names; `&` intersects."""
    parts = [_one_mask(part.strip()) for part in text.split("&")]
    mask = parts[0]
    for part in parts[1:]:
        mask &= part
    return mask


def _one_mask(text: str) -> Mask:
    name, _, numbers = text.partition(":")
    values = [int(n) for n in numbers.split(",")] if re.fullmatch(r"\d{1,18}(,\d{1,18})*", numbers) else []
    if text == "full":
        return full()
    if text == "causal":
        return causal()
    if name == "window" and len(values) in (1, 2):
        return sliding_window(*values)
    if name == "documents" and values:
        return documents(values)
    if name == "prefix" and len(values) == 1:
        return prefix_lm(*values)
    raise PlanError(f"--mask {text[:80]}: give full, causal, window:LEFT[,RIGHT], documents:0,END,END,.. or prefix:LENGTH")


def _topology(text: str | None) -> Topology | str | None:
    """A preset's name stays a name; anything that looks like a file is read."""
    looks_like_file = text is not None and text not in PRESETS and ("." in text or "/" in text)
    return load_topology(text) if text is not None and looks_like_file else text
