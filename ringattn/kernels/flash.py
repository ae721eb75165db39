"""Implements what the flash-attn packages have in common: layout, head sizes, windows, and many segments in one call.

They take (batch, rows, heads, head_dim) in bf16 or fp16 on CUDA, share KV heads natively, take bands as windows and cap logits,
so they need neither masks nor the reference. A subclass makes the call (`flash2`, `flash3`, `flash4`); `adapters` adds what
they lack. Only a softcap together with a bias is computed by the reference: the bias channels would be capped too.

- Windows are aligned bottom-right: row i attends to keys [i + keys - rows - left, i + keys - rows + right], while a band is
  relative to the top left. `window` converts. flash-attn 2 treats a window wider than the keys as none, which is correct only
  where there are no more rows than keys; other bands are split until that holds.
- Segments with the same window go into one varlen call, packed one after another: a document each, for example.
- lse is passed to the backward by its pointer, so it must be contiguous there.

Gradients are the same bits every time under `torch.use_deterministic_algorithms(True)`, as with torch's own CUDA operators.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.adapters import bias_grad, mask_empty_rows, pad_head_dim, up_to, with_bias
from ringattn.kernels.base import Grads, KernelCall, Operands, Options, Rows
from ringattn.kernels.cuda_only import CudaOnly
from ringattn.kernels.device_constants import cached_per_stream
from ringattn.kernels.external import Package
from ringattn.kernels.lse import Partial
from ringattn.kernels.operator_choice import Facts
from ringattn.kernels.reference import Reference
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment, strips

ANY = -1  # an unbounded side of a window
ALIGNED = 8  # head sizes are multiples of this
LENGTHS_KEPT = 1024  # one for each varlen call of a plan, one number for each sequence in it


class Lengths(NamedTuple):
    """Sequences packed one after another: the start of each, and the longest."""

    q: Tensor
    k: Tensor
    longest_q: int
    longest_k: int


class Call(NamedTuple):
    """One call: tensors are (batch, rows, heads, head_dim), or packed with `lengths`: (all rows, heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float  # 0 for none
    window: tuple[int, int]  # bottom-right aligned
    lengths: Lengths | None

    @property
    def causal(self) -> bool:
        return self.window == (ANY, 0)


class Flash(CudaOnly):
    package: ClassVar[Package]
    generations: ClassVar[range]  # supported major compute capabilities
    largest_head_dim = 256
    needs_out = True
    one_head_dim: ClassVar[bool] = True  # whether v must have as many channels as q and k

    def __init__(self) -> None:
        self.module, self.calls = self.package.load()

    @classmethod
    def unsupported_on_device(cls, call: KernelCall, device: Facts) -> str | None:
        generation, supported = device.capability[0], cls.generations
        if generation in supported:
            return None
        return f"kernel {cls.name!r} is for compute capability {supported[0]} to {supported[-1]}, and this is {generation}"

    @classmethod
    def operator_of(cls, call: KernelCall) -> str:
        return Reference.name if call.bias and call.softcap else cls.name  # the channels of a bias would be capped too

    @abstractmethod
    def call_forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Returns out, shaped as q, and lse: (batch, heads, rows), or packed (heads, all rows)."""

    @abstractmethod
    def call_backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv, shaped as q, k, v."""

    def refine(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        fits = [
            [segment] if segment.rows <= segment.keys or segment.band == FULL else strips(segment, segment.keys)
            for segment in segments
        ]
        return sorted((part for parts in fits for part in parts), key=_window_of)

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        (part,) = self._run_forward([block], [band], options)
        return part

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        (part,) = self._run_backward([block], [rows], [band], options)
        return part

    def parts_forward(self, block: Operands, segments: Sequence[Segment], options: Options) -> Iterator[Partial]:
        for _, run in groupby(segments, _window_of):
            group = list(run)
            yield from self._run_forward(
                [block.cut(segment) for segment in group], [segment.band for segment in group], options
            )

    def parts_backward(self, block: Operands, rows: Rows, segments: Sequence[Segment], options: Options) -> Iterator[Grads]:
        for _, run in groupby(segments, _window_of):
            group = list(run)
            blocks, cuts = [block.cut(segment) for segment in group], [rows.cut(segment) for segment in group]
            yield from self._run_backward(blocks, cuts, [segment.band for segment in group], options)

    def _run_forward(self, blocks: Sequence[Operands], bands: Sequence[Band], options: Options) -> Iterable[Partial]:
        if _needs_reference(blocks[0], options):
            return [Reference().segment_forward(block, band, options) for block, band in zip(blocks, bands, strict=True)]
        out, lse = self.call_forward(self._call(blocks, bands, options))
        dim, sizes = blocks[0].v.shape[-1], [block.q.shape[2] for block in blocks]
        outs, lses = _unpack(out.narrow(-1, 0, dim), sizes, blocks[0]), _unpack_lse(lse, sizes, blocks[0])
        return [mask_empty_rows(*parts) for parts in zip(outs, lses, blocks, bands, strict=True)]

    def _run_backward(
        self, blocks: Sequence[Operands], rows: Sequence[Rows], bands: Sequence[Band], options: Options
    ) -> Iterable[Grads]:
        first = blocks[0]
        if _needs_reference(first, options):
            return [Reference().segment_backward(*parts, options) for parts in zip(blocks, rows, bands, strict=True)]
        call = self._call(blocks, bands, options)
        width = call.v.shape[-1]
        dout = _pack([pad_head_dim(r.dout, width) for r in rows])
        out = _pack([pad_head_dim(r.any_out, width) for r in rows])
        grads = self.call_backward(call, dout, out, _pack_lse([r.lse for r in rows]))
        dim, bias, value_dim = first.q.shape[-1], first.bias, first.v.shape[-1]
        sizes = ([b.q.shape[2] for b in blocks], [b.k.shape[2] for b in blocks], [b.k.shape[2] for b in blocks])
        dqs, dks, dvs = (_unpack(grad, size, first) for grad, size in zip(grads, sizes, strict=True))
        return [
            Grads(
                dq.narrow(-1, 0, dim),
                dk.narrow(-1, 0, dim),
                dv.narrow(-1, 0, value_dim),
                None if bias is None else bias_grad(dk, dim, bias, options.scale),
            )
            for dq, dk, dv in zip(dqs, dks, dvs, strict=True)
        ]

    def _call(self, blocks: Sequence[Operands], bands: Sequence[Band], options: Options) -> Call:
        parts = [self._adapted(block, options.scale) for block in blocks]
        q, k, v = (_pack(tensors) for tensors in zip(*parts, strict=True))
        lengths = None
        if len(blocks) > 1:
            batch = range(blocks[0].q.shape[0])
            q_sizes, k_sizes = zip(*(_size(block) for block in blocks for _ in batch), strict=True)
            lengths = Lengths(_starts(q_sizes, q.device), _starts(k_sizes, q.device), max(q_sizes), max(k_sizes))
        return Call(q, k, v, options.scale, options.softcap or 0.0, window(*_size(blocks[0]), bands[0]), lengths)

    def _adapted(self, block: Operands, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with the channels of the bias, in head sizes that the package supports."""
        q, k, v, bias = block
        if bias is not None:
            q, k = with_bias(q, k, bias, scale)
        width, value_width = up_to(ALIGNED, q.shape[-1]), up_to(ALIGNED, v.shape[-1])
        if self.one_head_dim:
            width = value_width = max(width, value_width)
        return pad_head_dim(q, width), pad_head_dim(k, width), pad_head_dim(v, value_width)


def window(rows: int, keys: int, band: Band) -> tuple[int, int]:
    """Convert a band to a window: how far row i attends to both sides of key i + keys - rows. `ANY` where the edge decides.

    No side is negative, because in a segment the last row attends to a key and the last key has a row.
    """
    if band == CAUSAL and rows == keys:
        return ANY, 0  # whatever the size of the triangle, so that all of them may share a call
    shift = keys - rows
    left = ANY if band.left <= 1 - rows else shift - band.left
    right = ANY if band.right >= keys - 1 else band.right - shift
    return left, right


def _window_of(segment: Segment) -> tuple[int, int]:
    return window(segment.rows, segment.keys, segment.band)


def _size(block: Operands) -> tuple[int, int]:
    return block.q.shape[2], block.k.shape[2]


def _needs_reference(block: Operands, options: Options) -> bool:
    return options.softcap is not None and block.bias is not None


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """(batch, heads, rows, dim) as (batch, rows, heads, dim); several are packed, all batches of each, one after another."""
    if len(parts) == 1:
        return parts[0].transpose(1, 2)
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])


def _unpack(packed: Tensor, sizes: Sequence[int], like: Operands) -> list[Tensor]:
    if len(sizes) == 1:
        return [packed.transpose(1, 2)]
    batch = like.q.shape[0]
    return [part.unflatten(0, (batch, -1)).transpose(1, 2) for part in packed.split([batch * size for size in sizes])]


def _pack_lse(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts], dim=1)


def _unpack_lse(packed: Tensor, sizes: Sequence[int], like: Operands) -> list[Tensor]:
    if len(sizes) == 1:
        return [packed]
    batch = like.q.shape[0]
    parts = packed.split([batch * size for size in sizes], dim=1)
    return [part.unflatten(1, (batch, -1)).transpose(0, 1) for part in parts]


@cached_per_stream(LENGTHS_KEPT)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
