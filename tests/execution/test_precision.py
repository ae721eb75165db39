"""bf16 over shards is as good as bf16 on one device: errors against fp64, relative to dense bf16 attention's own.

Each tile's result is rounded once to bf16 by the kernel, as dense attention rounds its own once, so the errors should be alike
and must not grow with the number of ranks; 1.5 leaves room for the two kinds of rounding that a dense kernel keeps in
registers.
"""

import pytest
import torch
from cases import MASKS, SCHEDULES, simulate

from ringattn import make_plan
from ringattn.schedule import token_ring


def rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.slow
@pytest.mark.timeout(240)  # sixteen ranks in one process
@pytest.mark.parametrize("world", [2, 4, 8, 16])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3)], ids=["mha", "9over3"])
def test_bf16_error_is_that_of_dense_bf16_attention(world: int, mask: str, heads: tuple[int, int]) -> None:
    length, source = 1024, torch.Generator().manual_seed(1)
    shapes = [(1, length, h, 64) for h in (heads[0], heads[1], heads[1], heads[0])]
    tensors = [torch.randn(shape, generator=source, dtype=torch.float64).bfloat16() for shape in shapes]
    arguments = dict(heads=heads[0], kv_heads=heads[1], head_dim=64, mask=MASKS[mask], layout="zigzag")
    exact = simulate(
        make_plan(length, world=1, dtype="float64", schedule=token_ring(1), **arguments), *(x.double() for x in tensors)
    )

    q, k, v = (x.clone().transpose(1, 2).requires_grad_() for x in tensors[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal", enable_gqa=True)
    grads = torch.autograd.grad(out, (q, k, v), tensors[3].transpose(1, 2))
    dense = [rms(x.transpose(1, 2), y) for x, y in zip((out, *grads), (exact[0], *exact[2:]), strict=True)]

    names = ["ring", "ring_direct", "bidirectional_ring", "token_ring", "token_ring_direct", "accumulating_ring", "mesh"]
    for name in [*names, *["ulysses"] * (world <= heads[0])]:
        plan = make_plan(
            length, world=world, dtype="bfloat16", schedule=name if name == "mesh" else SCHEDULES[name](world), **arguments
        )
        out, _, *grads = simulate(plan, *tensors)
        for name_of_result, x, y, bound in zip(
            ["out", "dq", "dk", "dv"], (out, *grads), (exact[0], *exact[2:]), dense, strict=True
        ):
            assert rms(x, y) <= 1.5 * bound, (name, name_of_result, rms(x, y) / bound)
