"""The product of everything, as cases that read like sentences, and how one is run against the meaning."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from meaning import dense
from torch import Tensor

from ringattn import Mask, Plan, causal, full, make_plan, positions
from ringattn.comm.simulated import Simulated
from ringattn.comm.transport import Transport
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options
from ringattn.schedule import (
    Schedule,
    accumulating_ring,
    bidirectional_ring,
    both_ways,
    divide,
    mesh,
    ring,
    split,
    take_turns,
    token_ring,
    ulysses,
)

SCHEDULES = {
    "ring": ring,
    "ring_direct": lambda world: ring(world, routing="direct", lookahead=2),
    "bidirectional_ring": bidirectional_ring,
    "token_ring": token_ring,
    "token_ring_direct": lambda world: token_ring(world, routing="direct"),
    "accumulating_ring": accumulating_ring,
    "token_ring_both_ways": lambda world: both_ways(split(token_ring(world), q=2)),
    "mesh": mesh,
    "mesh_direct": lambda world: mesh(world, q_routing="direct", kv_routing="direct"),
    "mesh_divided": lambda world: divide(mesh(world), q=2, kv=3),
    "token_ring_halves": lambda world: split(token_ring(world, direction=-1), q=2),
    "ring_quarters_in_turn": lambda world: take_turns(ring(world, routing="direct", lookahead=2), kv=4),
    "token_ring_halves_in_turn": lambda world: take_turns(token_ring(world, routing="direct", direction=-1), q=2),
    "ulysses": lambda world: ulysses(ring(1), world),
    "ulysses_in_stages": lambda world: ulysses(split(ring(1), q=2), world, stages=max(0, world - 1), groups=2),
    "ulysses_outside": lambda world: ulysses(split(token_ring(world // _small(world)), q=2), _small(world), stages=1),
}


def _small(world: int) -> int:
    """The smallest factor of `world` above 1."""
    return next((n for n in (2, 3, 5, 7) if world % n == 0), 1)


LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS = {"full": full(), "causal": causal()}
HEADS = {"mha": (4, 4), "9over3": (9, 3), "mqa": (4, 1)}

# Float64 has 16 digits; sums of a few dozen terms of size one lose two or three of them.
EXACT = 1e-12


@dataclass(frozen=True)
class Case:
    schedule: str
    layout: str
    mask: str
    heads: str
    world: int
    length: int

    def __str__(self) -> str:
        return f"{self.schedule}-{self.layout}-{self.mask}-{self.heads}-{self.world}ranks-{self.length}"

    def plan(self, **changes: Any) -> Plan:
        heads, kv_heads = HEADS[self.heads]
        given = dict(world=self.world, heads=heads, kv_heads=kv_heads, head_dim=8, dtype="float64", mask=MASKS[self.mask])
        given |= dict(schedule=SCHEDULES[self.schedule](self.world), layout=self.layout) | changes
        return make_plan(self.length, **given)


def product_of_everything(worlds: range, length: int, schedules: Iterable[str] = SCHEDULES) -> Iterator[Case]:
    for parts in product(schedules, LAYOUTS, MASKS, HEADS, worlds):
        yield Case(*parts, length)


@dataclass
class Example:
    """Random whole tensors and what dense attention makes of them, gradients included."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def example(heads: tuple[int, int], length: int, mask: Mask, *, batch: int = 2, dim: int = 8, seed: int = 0) -> Example:
    source = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(s, generator=source, dtype=torch.float64, requires_grad=True) for s in shapes)
    out, lse = dense(q, k, v, mask)
    dout = torch.randn(out.shape, generator=source, dtype=torch.float64)
    return Example(q, k, v, dout, out, lse, torch.autograd.grad(out, (q, k, v), dout))


def simulate(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, transport: Transport | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of whole tensors, every rank in this process; rows are in the order of the sequence again."""
    key_bias, sinks = options.pop("key_bias", None), options.pop("sinks", None)
    rows = [positions(plan, rank) - plan.layout.first for rank in range(plan.world)]
    keys = [positions(plan, rank, keys=True) for rank in range(plan.world)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    inputs = [
        Inputs(leaves[0][:, r], leaves[1][:, p], leaves[2][:, p], None if key_bias is None else key_bias[..., p], sinks)
        for r, p in zip(rows, keys, strict=True)
    ]
    result = attend(
        inputs, plan, Options(options.pop("scale", plan.head_dim**-0.5), **options), transport or Simulated(plan.world)
    )
    order = torch.cat(rows).argsort()
    out = torch.cat([o for o, _ in result], dim=1)[:, order]
    lse = torch.cat([lse for _, lse in result], dim=2)[:, :, order]
    extra = [x for x in (key_bias, sinks) if x is not None]
    return out.detach(), lse, *torch.autograd.grad(out, [*leaves, *extra], dout)


def worst(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest absolute difference; -inf equals -inf, and NaN differs from everything."""
    pairs = zip(actual, expected, strict=True)
    return max(
        (torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf).max().item() for a, b in pairs if a.numel()),
        default=0.0,
    )


def schedules(world: int) -> dict[str, Schedule]:
    """One of each single-lane schedule."""
    return {name: result for name, make in SCHEDULES.items() if isinstance(result := make(world), Schedule)}
