"""Defines kernels: attention of one block of queries to one block of keys on one device, over a list of segments.

    forward(Operands(q, k, v, bias), segments, options)                                  -> Partial(out, lse)
    backward(Operands(q, k, v, bias), Rows(dout, lse, delta, out), segments, options)    -> Grads(dq, dk, dv, dbias)

A kernel knows neither ranks nor masks nor schedules. Subclasses compute one segment; this module iterates over the list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.fused import surrogate_out
from ringattn.kernels.lse import Partial, accum_dtype, empty_partial, merge_
from ringattn.plan.kernel_names import KernelOption
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import Segment


class Options(NamedTuple):
    """Options of the logits, the same for every tile."""

    scale: float
    softcap: float | None = None  # logits = softcap * tanh(scale * q @ k / softcap) + bias


class Operands(NamedTuple):
    """The inputs of attention. heads is a multiple of kv_heads; v may have another head_dim than q and k."""

    q: Tensor  # (batch, heads, rows, head_dim)
    k: Tensor  # (batch, kv_heads, keys, head_dim)
    v: Tensor  # (batch, kv_heads, keys, head_dim)
    bias: Tensor | None  # (batch, kv_heads or 1, keys), added to the scaled logits

    def cut(self, segment: Segment) -> Operands:
        q, k, v, bias = self
        k, v = (x.narrow(2, segment.k_start, segment.keys) for x in (k, v))
        bias = None if bias is None else bias.narrow(2, segment.k_start, segment.keys)
        return Operands(q.narrow(2, segment.q_start, segment.rows), k, v, bias)


class Rows(NamedTuple):
    """Values of whole rows that backward needs to compute the share of one block of keys."""

    dout: Tensor  # (batch, heads, rows, head_dim)
    lse: Tensor  # (batch, heads, rows); +inf where a row attends to no key, so that its probabilities are exactly 0
    delta: Tensor  # (batch, heads, rows): sum(dout * out)
    out: Tensor | None = None  # shaped as dout: the true out, or any with the same delta, see `fused.surrogate_out`

    def cut(self, segment: Segment) -> Rows:
        dout, lse, delta, out = (None if x is None else x.narrow(2, segment.q_start, segment.rows) for x in self)
        return Rows(dout, lse, delta, out)  # type: ignore[arg-type]  # only out may be None

    @property
    def any_out(self) -> Tensor:
        """An out with this delta: the true one if it is available."""
        return surrogate_out(self.dout, self.delta) if self.out is None else self.out


class Grads(NamedTuple):
    """Gradients of one block; dbias is None when there is no bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


class Prepared(tuple[Segment, ...]):
    """Segments prepared for one kernel. Created once and reused in every call, since many documents have thousands."""

    rows_occur_once: bool

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Prepared:
        prepared = cls(segments)
        prepared.rows_occur_once = _rows_occur_once(segments)
        return prepared


class KernelCall(NamedTuple):
    """The properties of a call that decide whether a kernel can compute it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # of q and k
    value_dim: int
    heads: int = 1
    bias: bool = False
    softcap: bool = False
    bands: bool = False  # whether there are masks other than causal
    generation: int | None = None  # major compute capability; that of the device where it is None


class Kernel(ABC):
    """Computes attention segment by segment; a subclass computes a single segment, and defines what it cannot compute.

    Attributes:
        name: the name for make_plan(kernel=...).
        options: integers that the name may carry ("flash3:sm_margin=8"), which are keywords of the constructor.
        needs_out: whether backward takes `Rows.out` and not delta.
    """

    name: str
    options: ClassVar[Mapping[str, KernelOption]] = {}
    needs_out = False

    @classmethod
    def unsupported_reason(cls, call: KernelCall) -> str | None:
        """Why the kernel cannot compute such a call; None if it can. Called before anything is sent."""
        return None

    @classmethod
    def supports(cls, call: KernelCall) -> bool:
        return cls.unsupported_reason(call) is None

    @classmethod
    def operator_of(cls, call: KernelCall) -> str:
        """The name of the operator that computes the call. Ranks compare it: where it differs, results could differ."""
        return cls.name

    @abstractmethod
    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        """Attention within one rectangle. Every row attends to at least one key, unless its bias is -inf."""

    @abstractmethod
    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        """This rectangle's share of the gradients."""

    def refine(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """The segments as this kernel computes them; it may split and reorder them."""
        return segments

    def parts_forward(self, block: Operands, segments: Sequence[Segment], options: Options) -> Iterable[Partial]:
        """The result of every segment, in order; a kernel may compute several in one call."""
        return (self.segment_forward(block.cut(segment), segment.band, options) for segment in segments)

    def parts_backward(self, block: Operands, rows: Rows, segments: Sequence[Segment], options: Options) -> Iterable[Grads]:
        """The share of every segment, in order."""
        return (self.segment_backward(block.cut(segment), rows.cut(segment), segment.band, options) for segment in segments)

    def prepare(self, segments: Sequence[Segment]) -> Prepared:
        """A form of `segments` that `forward` and `backward` take without repeating the same work in every call."""
        return segments if isinstance(segments, Prepared) else Prepared.of(self.refine(segments))

    def _segments(self, segments: Sequence[Segment], block: Operands) -> Prepared:
        """The prepared segments; none for an empty batch, for which fused operators raise."""
        return self.prepare(segments if block.q.shape[0] else ())

    def forward(self, block: Operands, segments: Sequence[Segment], options: Options) -> Partial:
        block, options = positive_scale(block, options)
        q, segments = block.q, self._segments(segments, block)
        if _covers_block(segments, block):
            return self.segment_forward(block, segments[0].band, options)
        # Rows that occur in one segment only are copied; sums need the accumulation dtype.
        once = segments.rows_occur_once
        total = empty_partial(q.shape[:-1], block.v.shape[-1], q.dtype if once else accum_dtype(q.dtype), q.device)
        for segment, part in zip(segments, self.parts_forward(block, segments, options), strict=True):
            target = Partial(*(x.narrow(2, segment.q_start, segment.rows) for x in total))
            if once:
                target.out.copy_(part.out)
                target.lse.copy_(part.lse)
            else:
                merge_(target, part)
        return total

    def backward(self, block: Operands, rows: Rows, segments: Sequence[Segment], options: Options) -> Grads:
        if options.scale < 0:
            block, options = positive_scale(block, options)
            grads = self.backward(block, rows, segments, options)
            return grads._replace(dq=-grads.dq)
        if self.needs_out and rows.out is None:
            rows = rows._replace(out=rows.any_out)  # once for all segments
        segments = self._segments(segments, block)
        if _covers_block(segments, block):
            return self.segment_backward(block, rows, segments[0].band, options)
        dtype = block.q.dtype if len(segments) == 1 else accum_dtype(block.q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in block[:3])
        total = Grads(dq, dk, dv, None if block.bias is None else torch.zeros_like(block.bias))
        for segment, part in zip(segments, self.parts_backward(block, rows, segments, options), strict=True):
            total.dq.narrow(2, segment.q_start, segment.rows).add_(part.dq)
            for gradient, share in zip(total[1:], part[1:], strict=True):
                if gradient is not None and share is not None:
                    gradient.narrow(2, segment.k_start, segment.keys).add_(share)
        return total


def positive_scale(block: Operands, options: Options) -> tuple[Operands, Options]:
    """The same logits with a positive scale: fused operators assume that the largest product in a row has the largest logit."""
    if options.scale > 0:
        return block, options
    return block._replace(q=-block.q), options._replace(scale=-options.scale)


def _rows_occur_once(segments: Sequence[Segment]) -> bool:
    runs = sorted((segment.q_start, segment.q_stop) for segment in segments)
    return all(stop <= start for (_, stop), (start, _) in pairwise(runs))


def _covers_block(segments: Sequence[Segment], block: Operands) -> bool:
    return len(segments) == 1 and (segments[0].rows, segments[0].keys) == (block.q.shape[2], block.k.shape[2])
