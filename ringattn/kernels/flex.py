"""Calls flex_attention (torch 2.10 and later): bands, biases and softcap in one compiled kernel, in any combination.

Only its public functions are used. They differentiate out and lse with respect to q, k, v and the captured bias, from which the
share of one block of keys follows exactly: with w = exp(block's lse - row's lse), the factor of every probability of the block,
the block's gradients are those of

    sum(w * dout * out) + sum(w * (sum(dout * out) - delta) * lse)        (w, and out in the second sum, held fixed)

Therefore backward computes the block's forward again. A band is given as blocks of 128, computed without a mask of rows * keys;
its bounds are tensors, so that one compiled kernel serves every band.

On CUDA it is compiled in the first call, which takes some seconds. On the CPU it runs uncompiled, for tests, and since it has
no backward there, `reference` computes that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringattn.errors import InputError
from ringattn.kernels.base import Grads, Kernel, KernelCall, Operands, Options, Rows
from ringattn.kernels.device_constants import cached_per_stream
from ringattn.kernels.lse import Partial, accum_dtype
from ringattn.kernels.reference import Reference
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import FULL

BLOCK = 128
MASKS_KEPT = 32  # each has two numbers for every pair of blocks


class Flex(Kernel):
    name = "flex"

    @classmethod
    def unsupported_reason(cls, call: KernelCall) -> str | None:
        no_float64 = call.device.type == "cuda" and call.dtype == torch.float64
        return "kernel 'flex' takes no float64 on CUDA" if no_float64 else None

    def __init__(self) -> None:
        try:
            from torch.nn.attention.flex_attention import AuxRequest, flex_attention
        except ImportError as error:
            raise InputError(f"this torch has no flex_attention that returns lse ({error}); install 2.10 or later") from error
        self.function: Callable[..., Any] = flex_attention
        self.aux = AuxRequest(lse=True)

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        q, k, v, bias = block  # detached, because flex looks at requires_grad even where no gradient is recorded
        detached = Operands(q.detach(), k.detach(), v.detach(), None if bias is None else bias.detach())
        with torch.no_grad():
            out, lse = self._attend(detached, band, options)
        return Partial(out, lse.to(accum_dtype(out.dtype)))

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        if not self._differentiates(block.q):
            return Reference().segment_backward(block, rows, band, options)
        leaves = Operands(*(None if x is None else x.detach().requires_grad_() for x in block))  # type: ignore[arg-type]
        with torch.enable_grad():
            out, lse = self._attend(leaves, band, options)
        dout, delta = rows.dout, rows.delta
        weight = torch.exp(lse.detach() - rows.lse)
        dlse = weight * ((dout.to(delta.dtype) * out.detach()).sum(-1) - delta)
        inputs = [x for x in leaves if x is not None]
        grads = torch.autograd.grad((out, lse), inputs, ((weight.unsqueeze(-1) * dout).to(out.dtype), dlse.to(lse.dtype)))
        return Grads(grads[0], grads[1], grads[2], grads[3] if len(grads) > 3 else None)

    def _differentiates(self, q: Tensor) -> bool:
        return q.device.type == "cuda"

    def _attend(self, block: Operands, band: Band, options: Options) -> tuple[Tensor, Tensor]:
        q, k, v, bias = block
        function = _compiled(self.function) if q.device.type == "cuda" else _uncompiled(self.function)
        mask = None if band == FULL else block_mask(q.shape[2], k.shape[2], band, q.device)
        change = _score_mod(bias, q.shape[1], options.softcap)
        out, aux = function(q, k, v, change, mask, options.scale, enable_gqa=True, return_aux=self.aux)
        return out, aux.lse


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Suppress the warning that flex_attention is not compiled."""

    def quiet(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return function(*args, **options)

    return quiet


def _score_mod(bias: Tensor | None, heads: int, softcap: float | None) -> Callable[..., Tensor] | None:
    if bias is None and softcap is None:
        return None
    shared = 1 if bias is None else heads // bias.shape[1]  # query heads that share a head of the bias

    def change(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[b, h // shared, key]

    return change


@cached_per_stream(MASKS_KEPT)
def block_mask(rows: int, keys: int, band: Band, device: torch.device) -> Any:
    """The band as flex takes it: which blocks hold cells, and which of these are full."""
    from torch.nn.attention.flex_attention import BlockMask

    reach = rows + keys  # larger than any offset, and small enough for int32
    left, right = max(band.left, -reach), min(band.right, reach)
    least_kept, most_kept = torch.tensor(left, device=device), torch.tensor(right, device=device)

    def in_band(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key - row >= least_kept) & (key - row <= most_kept)

    row, key = (torch.arange(0, size, BLOCK) for size in (rows, keys))
    row_end, key_end = (row + BLOCK).clamp(max=rows), (key + BLOCK).clamp(max=keys)
    least, most = key - (row_end - 1).unsqueeze(1), (key_end - 1) - row.unsqueeze(1)
    touched = (most >= left) & (least <= right)
    # Blocks that reach over the edge are masked cell by cell.
    inside = (row + BLOCK <= rows).unsqueeze(1) & (key + BLOCK <= keys)
    full = touched & (least >= left) & (most <= right) & inside
    count, which, full_count, full_which = (x.to(device) for grid in (touched & ~full, full) for x in _listed(grid))
    return BlockMask.from_kv_blocks(
        count, which, full_count, full_which, BLOCK_SIZE=BLOCK, mask_mod=in_band, seq_lengths=(rows, keys)
    )


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks the number of marked ones, and their indices in order, before those of the others."""
    order = torch.argsort(grid.int(), dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
