"""From the arguments of `make_plan` to a plan: `request` checks them, `choose` decides what they leave open, by price.

Without a topology the plan is made for `infiniband`: nodes of eight behind a switch. Up to eight ranks that is one switch,
which gives every schedule the same port and so lets bytes decide; beyond, it knows that leaving a node is dear. To have the
links at hand instead, measure them with `ringattn probe`.

No torch here, and no process group: every rank calls this by itself, with the same arguments, and finds the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringattn.plan.kernel_names import KERNELS
from ringattn.plan.plan import Plan
from ringattn.planner.closed_form import rank_families
from ringattn.planner.cost import Cost, compute_seconds, price, traffic, transfer_seconds
from ringattn.planner.cost.memory import pass_bytes
from ringattn.planner.request import DEFAULT_TOPOLOGY, request
from ringattn.planner.search import Candidate, all_candidates, choose
from ringattn.planner.topology import PRESETS, Topology, load_topology
from ringattn.schedule import Schedule
from ringattn.sequence.layout import Layout
from ringattn.sequence.mask import Mask, causal

__all__ = [
    "DEFAULT_TOPOLOGY",
    "KERNELS",
    "PRESETS",
    "Candidate",
    "Cost",
    "Topology",
    "candidates",
    "compute_seconds",
    "load_topology",
    "make_plan",
    "pass_bytes",
    "price",
    "rank_families",
    "traffic",
    "transfer_seconds",
]


def make_plan(
    seq_len: int,
    *,
    world: Any,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: Any = "float32",
    mask: Mask = causal(),  # noqa: B008  (immutable)
    schedule: str | Schedule | Sequence[Schedule] = "auto",
    layout: str | Layout = "auto",
    ulysses: int | None = None,
    kernel: str = "auto",
    topology: Topology | str | None = None,
    buffer_limit: int | None = None,
    training: bool = True,
    kv_len: int | None = None,
    q_offset: int | None = None,
    partials: str = "auto",
) -> Plan:
    """Decide how attention over `seq_len` tokens is cut over `world` ranks. Cached; equal on every rank for equal arguments.

    Args:
        seq_len: tokens in the whole sequence, and queries; need not divide by anything.
        world: number of ranks, or the 1-D DeviceMesh or ProcessGroup that has them.
        heads: query heads of the whole model, a multiple of kv_heads.
        kv_heads: key and value heads; by default as many as heads.
        head_dim: of q, k and v.
        dtype: float32, float64, bfloat16 or float16, as torch dtype or by name.
        mask: from `full`, `causal`, `sliding_window`, `documents`, `prefix_lm`, or several of them joined with `&`.
        schedule: "auto", a name (see `ringattn.schedule.catalog`), a `Schedule`, or several that share the heads. "auto" leaves
            out all_gather, whose buffers grow with the whole sequence.
        layout: "auto", "contiguous", "zigzag", "striped", "documents" (see `ringattn.sequence.document_layout`) or a `Layout`.
        ulysses: how many neighbouring ranks trade sequence for heads (see `ringattn.schedule.ulysses`); it divides world and
            need not divide heads. None lets "auto" choose, and is 1 for a schedule by name. With a `Schedule` of world /
            ulysses ranks that one runs inside.
        kernel: "auto" ("sdpa": torch's own operators, chosen at the call by device, dtype and head sizes), one of these pinned
            ("cudnn", "flash", "efficient"), "flex", "flash2", "flash3" (or "flash3:sm_margin=8", which leaves SMs to
            transfers), "flash4", "reference" in plain mathematics, or "emulated:" and a number of flop/s: right timing, no
            right numbers. What one of them cannot compute is told by the call.
        topology: what to price it on: a `Topology`, a preset's name, or None for a sober default.
        buffer_limit: bytes that a rank may hold beyond its own rows during a pass, for each sequence of a batch; None: any.
        training: whether backward counts in the choice. For inference say False: the plan is the best for forward alone, and
            its backward, which works all the same, is whatever that schedule makes of it.
        kv_len: keys and values in the whole sequence, where they are not as many as queries: in cross-attention, or where a
            chunk of queries meets all keys so far. With a `Layout` it is that of the layout (see `Layout.after` for chunks).
        q_offset: position of the first query among the keys; masks go by it. Required where kv_len differs from seq_len, unless
            the mask is full.
        partials: what sums (out, dq, dk, dv of a block) travel in. "auto": in `dtype` where they are rounded only once, else in
            fp32; "wide": always in fp32; "narrow": always in `dtype`, at an error that grows with the number of hops.

    Raises:
        PlanError: an argument is out of range, unknown, or contradicts another.
        ScheduleError: a schedule given as data is not a correct algorithm.
    """
    return choose(
        request(
            seq_len=seq_len,
            world=world,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            mask=mask,
            schedule=schedule,
            layout=layout,
            ulysses=ulysses,
            kernel=kernel,
            topology=topology,
            buffer_limit=buffer_limit,
            training=training,
            kv_len=kv_len,
            q_offset=q_offset,
            partials=partials,
        )
    )


def candidates(seq_len: int, *, world: Any, heads: int, head_dim: int, **others: Any) -> list[Candidate]:
    """Everything that `make_plan` with the same arguments would choose from, priced; the fastest in all passes first."""
    parsed = request(seq_len=seq_len, world=world, heads=heads, head_dim=head_dim, **others)
    return sorted(
        all_candidates(parsed), key=lambda option: sum(option.cost(backward=backward).seconds for backward in parsed.passes)
    )
