"""From the arguments of `make_plan` to a plan: read them, check them, choose what was left open.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ringattn.errors import PlanError
from ringattn.layout import LAYOUTS, Layout
from ringattn.mask import Mask, causal
from ringattn.plan import Plan, make_lanes
from ringattn.schedule import Schedule, bidirectional_ring, ring, token_ring

def make_plan(seq_len, *, world, heads, kv_heads=None, head_dim, dtype="float32", mask=causal(), schedule="auto", layout="auto", ulysses=None, kernel="auto", topology=None, **kw):
    lay = LAYOUTS["zigzag" if layout=="auto" else layout](seq_len, world) if isinstance(layout,str) else layout
    sch = schedule if not isinstance(schedule,str) else {"ring":lambda: ring(world),"token_ring":lambda: token_ring(world),"token_ring_direct":lambda: token_ring(world,routing="direct"),"bidirectional_ring":lambda: bidirectional_ring(world),"auto":lambda: token_ring(world)}[schedule]()
    if isinstance(sch, Schedule): sch=(sch,)
    kv_heads = kv_heads or heads
    lanes = make_lanes(tuple(sch), lay, mask, kv_heads)
    return Plan(seq_len, world, heads, kv_heads, head_dim, str(dtype).removeprefix("torch."), mask, lay, "sdpa" if kernel=="auto" else kernel, lanes, lanes)
