"""Computes attention with torch's fused operators: the default on every device, since they are always available.

`adapters` adds what they lack (bias, backward from delta, rows without keys). A band needs an explicit mask, which is built for
a few hundred rows at a time, so memory and work grow with rows * window; the flash-attn packages (`flash`) take bands directly.
No operator has softcap: `reference` computes it, in memory that grows with rows * keys.

`sdpa` uses the operator that torch itself would, see `operator_choice`; `cudnn`, `flash` and `efficient` prefer one on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.kernels.adapters import bias_grad, mask_empty_rows, pad_head_dim, with_bias
from ringattn.kernels.aten import ALIGNED_KEYS, FUSED, Call, Fused
from ringattn.kernels.base import Grads, Kernel, KernelCall, Operands, Options, Rows
from ringattn.kernels.cuda_only import CudaOnly, short_dtype, width_of
from ringattn.kernels.device_constants import cached_per_stream
from ringattn.kernels.lse import Partial
from ringattn.kernels.operator_choice import (
    LARGEST_CUDNN,
    LARGEST_FLASH,
    CallShape,
    Facts,
    call_width,
    chosen,
    cudnn_takes,
    efficient_takes,
    flash_takes,
)
from ringattn.kernels.reference import Reference, band_mask
from ringattn.sequence.mask import Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment, strips

ROWS_PER_MASK = 512
MASKS_KEPT = 8  # the strips of a window reuse the same few; each has rows * keys numbers


class Sdpa(Kernel):
    name = "sdpa"
    needs_out = True

    @classmethod
    def operator_of(cls, call: KernelCall) -> str:
        if call.softcap:
            return Reference.name
        shape = CallShape(call.dtype, width_of(call), 2, call.bands, call.heads)
        return chosen(cls.name, call.device, shape)

    def operator(self, block: Operands, band: Band) -> Fused | None:
        """The operator that computes a segment, or None where only `reference` can."""
        return FUSED.get(chosen(self.name, block.q.device, _shape(block, band)))

    def refine(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        return [
            part
            for segment in segments
            for part in ([segment] if segment.band in (FULL, CAUSAL) else strips(segment, ROWS_PER_MASK))
        ]

    def segment_forward(self, block: Operands, band: Band, options: Options) -> Partial:
        fused = self._fused(block, band, options)
        if fused is None:
            return Reference().segment_forward(block, band, options)
        out, lse = fused.forward(_call(block, band, options))
        return mask_empty_rows(_first(out, block.v.shape[-1]), lse, block, band)

    def segment_backward(self, block: Operands, rows: Rows, band: Band, options: Options) -> Grads:
        q, _, v, bias = block
        fused = self._fused(block, band, options)
        if fused is None:
            return Reference().segment_backward(block, rows, band, options)
        call = _call(block, band, options)
        width = call.q.shape[-1]
        dq, dk, dv = fused.backward(call, pad_head_dim(rows.dout, width), pad_head_dim(rows.any_out, width), rows.lse)
        dim = q.shape[-1]
        dbias = None if bias is None else bias_grad(dk, dim, bias, options.scale)
        return Grads(_first(dq, dim), _first(dk, dim), _first(dv, v.shape[-1]), dbias)

    def _fused(self, block: Operands, band: Band, options: Options) -> Fused | None:
        return None if options.softcap is not None else self.operator(block, band)


class _Pinned(CudaOnly, Sdpa):
    """A particular one of torch's operators. Bands, and calls that it does not support, go to the memory-efficient one."""

    @classmethod
    def unsupported_on_device(cls, call: KernelCall, device: Facts) -> str | None:
        shape = CallShape(call.dtype, width_of(call), 2)
        if efficient_takes(shape, device) and cls.takes(shape, device):
            return None
        (major, minor), cudnn = device.capability, f" and cuDNN {device.cudnn}" if cls is Cudnn else ""
        size = f"head size {shape.width} in {short_dtype(call.dtype)}"
        return f"torch's operator {cls.name!r} does not take {size} with compute capability {major}.{minor}{cudnn}"

    @classmethod
    def takes(cls, shape: CallShape, device: Facts) -> bool:
        return True


class Cudnn(_Pinned):
    name = "cudnn"
    largest_head_dim = LARGEST_CUDNN

    @classmethod
    def unsupported_on_device(cls, call: KernelCall, device: Facts) -> str | None:
        if device.deterministic:
            return "kernel 'cudnn' has no deterministic backward, and torch.use_deterministic_algorithms(True) asks for one"
        return super().unsupported_on_device(call, device)

    @classmethod
    def takes(cls, shape: CallShape, device: Facts) -> bool:
        return cudnn_takes(shape, device)


class TorchFlash(_Pinned):
    name = "flash"
    largest_head_dim = LARGEST_FLASH

    @classmethod
    def takes(cls, shape: CallShape, device: Facts) -> bool:
        return flash_takes(shape, device)


class Efficient(_Pinned):
    name = "efficient"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)


def _shape(block: Operands, band: Band) -> CallShape:
    q, k, v, bias = block
    width = call_width(q.shape[-1], v.shape[-1], bias=bias is not None)
    return CallShape(q.dtype, width, k.shape[2], band not in (FULL, CAUSAL), max(q.shape[:2]))


@cached_per_stream(MASKS_KEPT)
def additive_mask(rows: int, keys: int, band: Band, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, keys) in `dtype`, 0 within the band and -inf elsewhere, with rows aligned as the CUDA operators require."""
    short = 0 if device.type == "cpu" else -keys % ALIGNED_KEYS
    in_band = band_mask(rows, keys + short, band, device)
    return (
        torch.zeros(in_band.shape, dtype=dtype, device=device)
        .masked_fill_(in_band.logical_not_(), -torch.inf)
        .narrow(-1, 0, keys)
    )


def _call(block: Operands, band: Band, options: Options) -> Call:
    """The fused call for one segment: bias as two more channels, equal head sizes, a mask only for a band."""
    q, k, v, bias = block
    if bias is not None:
        q, k = with_bias(q, k, bias, options.scale)
    width = max(q.shape[-1], v.shape[-1])
    mask = None
    if band not in (FULL, CAUSAL):
        mask = additive_mask(q.shape[2], k.shape[2], band, q.dtype, q.device)
    return Call(pad_head_dim(q, width), pad_head_dim(k, width), pad_head_dim(v, width), mask, band == CAUSAL, options.scale)


def _first(x: Tensor, width: int) -> Tensor:
    return x.narrow(-1, 0, width)
