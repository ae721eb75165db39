"""Plans one attention: `request` checks the arguments of `make_plan`, `choose` decides what they leave open, by price.

Without a topology the plan is made for `infiniband`: nodes of eight behind a switch. Up to eight ranks that is one switch,
which gives every schedule the same port and so lets bytes decide; beyond, it accounts for the cost of leaving a node. To plan
for the actual links, measure them with `ringattn probe`.

No torch here, and no process group: every rank makes this call by itself, with the same arguments, and gets the same plan.
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
    """Decides how attention over `seq_len` tokens is cut over `world` ranks. Cached; equal on every rank for equal arguments.

    Args:
        seq_len: tokens in the complete sequence, which are the queries; any number.
        world: number of ranks, or a 1-D DeviceMesh or ProcessGroup of them.
        heads: query heads of the model (over all ranks), a multiple of kv_heads.
        kv_heads: key and value heads; by default as many as heads.
        head_dim: of q, k and v.
        dtype: float32, float64, bfloat16 or float16, as torch dtype or by name.
        mask: from `full`, `causal`, `sliding_window`, `documents`, `prefix_lm`, or several of them combined with `&`.
        schedule: "auto", a name (see `ringattn.schedule.catalog`), a `Schedule`, or several that share the heads. "auto" omits
            all_gather, whose buffers grow with the sequence.
        layout: "auto", "contiguous", "zigzag", "striped", "documents" (see `ringattn.sequence.document_layout`) or a `Layout`.
        ulysses: how many neighbouring ranks exchange sequence for heads (see `ringattn.schedule.ulysses`); it divides world and
            need not divide heads. None lets "auto" choose, and is 1 for a schedule by name. A `Schedule` for world /
            ulysses ranks runs inside.
        kernel: "auto" or "sdpa" (torch's own operators, chosen at the call by device, dtype and head sizes), one of these
            operators ("cudnn", "flash", "efficient"), "flex", "flash2", "flash3" (or "flash3:sm_margin=8", which leaves SMs
            to transfers), "flash4", "reference" in plain mathematics, or "emulated:" and a number of flop/s: realistic
            timing, wrong numbers. `attention` raises where a kernel does not support its arguments.
        topology: the links to price for: a `Topology`, the name of a preset, or None for `DEFAULT_TOPOLOGY`.
        buffer_limit: bytes that a rank may hold beyond its own rows during a pass, per sequence of a batch; None: no limit.
        training: whether backward counts in the choice. For inference pass False: the plan is the best for forward alone, and
            its backward, which still works, uses the same schedule.
        kv_len: number of keys and values, where it differs from that of queries: in cross-attention, or where a chunk of
            queries attends to all keys so far. With a `Layout` it is that of the layout (see `Layout.after` for chunks).
        q_offset: position of the first query among the keys, as masks count it. Required where kv_len differs from seq_len,
            unless the mask is full.
        partials: dtype in which sums (out, dq, dk, dv of a block) travel. "auto": `dtype` where they are rounded only once,
            else fp32; "wide": always fp32; "narrow": always `dtype`, with an error that grows with the number of hops.

    Raises:
        PlanError: an argument is out of range, unknown, or contradicts another.
        ScheduleError: a schedule passed as data is not a correct algorithm.
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
    """All candidates of `make_plan` with the same arguments, priced; the fastest over all passes first."""
    parsed = request(seq_len=seq_len, world=world, heads=heads, head_dim=head_dim, **others)
    return sorted(
        all_candidates(parsed), key=lambda option: sum(option.cost(backward=backward).seconds for backward in parsed.passes)
    )
