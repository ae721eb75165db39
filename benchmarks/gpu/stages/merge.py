"""Times the merging of partial results against a copy: ours two at a time and n at once, and ring-flash-attention's formula.

Every figure is the bytes that cannot be avoided, which are each partial read once and the sum read and written once, over the
seconds. Before it is timed, each way is compared with softmax weights in fp64.
The surrogate out of backward is timed too: what stands for out where only dout and delta = sum(dout * out) are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import error, often
from stage import Stage
from torch import Tensor

from ringattn.kernels import Partial, fused

Way = Callable[[Partial, Sequence[Partial]], Partial]  # (sum so far, partials) to the new sum, perhaps in the old one's memory


def run(stage: Stage) -> None:
    shape = (1, 4, 256, 32) if stage.small else (1, 32, 8192, 128)
    stage.note(shape=str(shape), partials="bfloat16 into float32", fused="yes")
    whole = torch.empty(2, *shape, dtype=torch.float32, device=stage.device).zero_()
    copied = 2 * whole[0].nbytes / often(stage.device, lambda: whole[1].copy_(whole[0]), calls=3 if stage.small else 20)
    stage.note(copy_gb_per_s=round(copied / 1e9, 1))
    for count in (1, 2, 4, 7):
        parts = [partial(shape, torch.bfloat16, n, stage.device) for n in range(count)]
        for name, way in WAYS.items():
            with stage.guard(f"{name}, {count} partials"):
                entry(stage, name, way, parts, copied)
    with stage.guard("surrogate out"):
        surrogate(stage, shape, copied)


def partial(shape: Sequence[int], dtype: torch.dtype, seed: int, device: torch.device) -> Partial:
    source = torch.Generator(device).manual_seed(seed)
    out = torch.randn(*shape, generator=source, device=device).to(dtype)
    return Partial(out, torch.randn(*shape[:-1], generator=source, device=device))


def entry(stage: Stage, name: str, way: Way, parts: list[Partial], copied: float) -> None:
    """One row: how wrong it is, GB/s and the share of a copy's."""
    start = partial(parts[0].out.shape, torch.float32, 99, stage.device)
    into = Partial(start.out.clone(), start.lse.clone())
    out, lse = way(into, parts)
    exact_out, exact_lse = exactly([start, *parts])
    # fp32 has 2^-24; exp and log lose a digit, and each merge rounds once more.
    wrong = max(error(out, exact_out), error(lse, exact_lse))
    stage.check(wrong < 1e-5, f"{name}, {len(parts)} partials: off by {wrong:.1e} of fp64 softmax weights")
    seconds = often(stage.device, lambda: way(into, parts), calls=2 if stage.small else 20, rounds=3 if stage.small else 5)
    nbytes = sum(x.nbytes for part in parts for x in part) + 2 * sum(x.nbytes for x in into)
    speed = nbytes / seconds
    share = round(speed / copied, 3)
    stage.row("merge", way=name, partials=len(parts), us=round(1e6 * seconds, 1), gb_per_s=round(speed / 1e9, 1), of_copy=share)
    if name == "ours" and not stage.small:
        stage.goal(f"merging {len(parts)} partials: share of the copy bandwidth", share, least=0.8)


def exactly(parts: Sequence[Partial]) -> tuple[Tensor, Tensor]:
    lse = torch.stack([part.lse.double() for part in parts])
    weights = lse.softmax(0)
    total = torch.zeros_like(parts[0].out, dtype=torch.float64)
    for weight, part in zip(weights, parts, strict=True):
        total += weight.unsqueeze(-1) * part.out.double()
    return total, lse.logsumexp(0)


def ours(into: Partial, parts: Sequence[Partial]) -> Partial:
    """All at once."""
    rows = into.out.shape[2]
    total = Partial(torch.empty_like(into.out), torch.empty_like(into.lse))
    fused.merge([fused.PartialRows(0, rows, *part) for part in (into, *parts)], *total)
    return total


def ours_one_by_one(into: Partial, parts: Sequence[Partial]) -> Partial:
    for part in parts:
        into = ours(into, [part])
    return into


def peers(into: Partial, parts: Sequence[Partial]) -> Partial:
    """out - sigmoid(block_lse - lse) * (out - block_out) and lse - logsigmoid(lse - block_lse): the update that
    https://github.com/zhuzilin/ring-flash-attention makes, in torch's operators. It makes new tensors, as theirs does."""
    out, lse = into
    for part in parts:
        block = part.out.to(torch.float32)
        out = out - torch.sigmoid(part.lse - lse).unsqueeze(-1) * (out - block)
        lse = lse - torch.nn.functional.logsigmoid(lse - part.lse)
    return Partial(out, lse)


WAYS: dict[str, Way] = {
    "ours": ours,
    "ours, one by one": ours_one_by_one,
    "ring-flash-attention's formula": peers,
}


def surrogate(stage: Stage, shape: Sequence[int], copied: float) -> None:
    """From dout and delta: read one, write one."""
    dtype = torch.bfloat16
    dout, out = partial(shape, dtype, 5, stage.device).out, partial(shape, dtype, 6, stage.device).out
    delta = (dout.float() * out.float()).sum(-1)
    make = fused.surrogate_out
    results = make(dout, delta)
    again = (dout.double() * results.double()).sum(-1)
    wrong = error(again, delta.double())
    # Each element is rounded to bf16 once, at most 2^-9, and rounding of 128 of them does not add up to more.
    stage.check(wrong < 4e-3, f"surrogate out: its products with dout are off by {wrong:.1e} of delta")
    seconds = often(stage.device, lambda: make(dout, delta), calls=2 if stage.small else 20)
    speed = (2 * dout.nbytes + delta.nbytes) / seconds
    figures = dict(us=round(1e6 * seconds, 1), gb_per_s=round(speed / 1e9, 1), of_copy=round(speed / copied, 3))
    stage.note(surrogate_out=figures)
