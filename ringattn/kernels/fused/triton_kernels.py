"""Triton kernels that merge partial results and prepare row statistics; `triton_ops` launches them.

Each program takes BLOCK_ROWS rows of one head of one batch entry, and all of head_dim. Arithmetic is in fp32 whatever the dtype
of the tensors. Starts and stops of parts vary from call to call, so kernels are not specialized on them.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

_BOUNDS = ["start0", "stop0", "start1", "stop1", "start2", "stop2", "start3", "stop3"]


@triton.jit
def _statistic(base, b, h, r, stride_b, stride_h, stride_s, live, other):
    """One number per row."""
    return tl.load(base + b * stride_b + h * stride_h + r * stride_s, mask=live, other=other).to(tl.float32)


@triton.jit
def _values(base, b, h, r, d, stride_b, stride_h, stride_s, live, DIM: tl.constexpr):
    """(rows, head_dim), 0 outside of the part."""
    at = base + b * stride_b + h * stride_h + r[:, None] * stride_s + d[None, :]
    return tl.load(at, mask=live[:, None] & (d[None, :] < DIM), other=0.0).to(tl.float32)


@triton.jit
def _write(base, b, h, r, d, stride_b, stride_h, stride_s, live, values, DIM: tl.constexpr):
    at = base + b * stride_b + h * stride_h + r[:, None] * stride_s + d[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=live[:, None] & (d[None, :] < DIM))


@triton.jit
def _place(BLOCK_ROWS: tl.constexpr):
    """Rows of this program, its head and batch entry; 64 bits wide, since a long sequence has more elements than 2^31."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return r, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)


@triton.jit(do_not_specialize=_BOUNDS)
def merge(
    out0, lse0, out0_b, out0_h, out0_s, lse0_b, lse0_h, lse0_s, start0, stop0,
    out1, lse1, out1_b, out1_h, out1_s, lse1_b, lse1_h, lse1_s, start1, stop1,
    out2, lse2, out2_b, out2_h, out2_s, lse2_b, lse2_h, lse2_s, start2, stop2,
    out3, lse3, out3_b, out3_h, out3_s, lse3_b, lse3_h, lse3_s, start3, stop3,
    out, lse, out_b, out_h, out_s, lse_b, lse_h, lse_s, rows,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    r, h, b = _place(BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    no_keys = -float("inf")

    live0 = (r >= start0) & (r < stop0)
    l0 = _statistic(lse0, b, h, r - start0, lse0_b, lse0_h, lse0_s, live0, no_keys)
    largest = l0
    if PARTS > 1:
        live1 = (r >= start1) & (r < stop1)
        l1 = _statistic(lse1, b, h, r - start1, lse1_b, lse1_h, lse1_s, live1, no_keys)
        largest = tl.maximum(largest, l1)
    if PARTS > 2:
        live2 = (r >= start2) & (r < stop2)
        l2 = _statistic(lse2, b, h, r - start2, lse2_b, lse2_h, lse2_s, live2, no_keys)
        largest = tl.maximum(largest, l2)
    if PARTS > 3:
        live3 = (r >= start3) & (r < stop3)
        l3 = _statistic(lse3, b, h, r - start3, lse3_b, lse3_h, lse3_s, live3, no_keys)
        largest = tl.maximum(largest, l3)

    # In a row without keys -inf minus -inf would be NaN; a NaN of the input must survive in the sum.
    base = tl.where(largest == no_keys, 0.0, largest)
    sum_of_exps = tl.exp(l0 - base)
    if PARTS > 1:
        sum_of_exps += tl.exp(l1 - base)
    if PARTS > 2:
        sum_of_exps += tl.exp(l2 - base)
    if PARTS > 3:
        sum_of_exps += tl.exp(l3 - base)
    merged = base + tl.log(sum_of_exps)
    tl.store(lse + b * lse_b + h * lse_h + r * lse_s, merged, mask=r < rows)

    base = tl.where(merged == no_keys, 0.0, merged)
    total = tl.exp(l0 - base)[:, None] * _values(out0, b, h, r - start0, d, out0_b, out0_h, out0_s, live0, DIM)
    if PARTS > 1:
        total += tl.exp(l1 - base)[:, None] * _values(out1, b, h, r - start1, d, out1_b, out1_h, out1_s, live1, DIM)
    if PARTS > 2:
        total += tl.exp(l2 - base)[:, None] * _values(out2, b, h, r - start2, d, out2_b, out2_h, out2_s, live2, DIM)
    if PARTS > 3:
        total += tl.exp(l3 - base)[:, None] * _values(out3, b, h, r - start3, d, out3_b, out3_h, out3_s, live3, DIM)
    _write(out, b, h, r, d, out_b, out_h, out_s, r < rows, total, DIM)


@triton.jit(do_not_specialize=_BOUNDS)
def add(
    part0, part0_b, part0_h, part0_s, start0, stop0,
    part1, part1_b, part1_h, part1_s, start1, stop1,
    part2, part2_b, part2_h, part2_s, start2, stop2,
    part3, part3_b, part3_h, part3_s, start3, stop3,
    out, out_b, out_h, out_s, rows,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    r, h, b = _place(BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    total = _values(part0, b, h, r - start0, d, part0_b, part0_h, part0_s, (r >= start0) & (r < stop0), DIM)
    if PARTS > 1:
        total += _values(part1, b, h, r - start1, d, part1_b, part1_h, part1_s, (r >= start1) & (r < stop1), DIM)
    if PARTS > 2:
        total += _values(part2, b, h, r - start2, d, part2_b, part2_h, part2_s, (r >= start2) & (r < stop2), DIM)
    if PARTS > 3:
        total += _values(part3, b, h, r - start3, d, part3_b, part3_h, part3_s, (r >= start3) & (r < stop3), DIM)
    _write(out, b, h, r, d, out_b, out_h, out_s, r < rows, total, DIM)


@triton.jit
def surrogate_out(
    dout, delta, out, dout_b, dout_h, dout_s, delta_b, delta_h, delta_s, out_b, out_h, out_s, rows,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    r, h, b = _place(BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    values = _values(dout, b, h, r, d, dout_b, dout_h, dout_s, r < rows, DIM)
    # Scaled by the largest of the row, the squares neither overflow nor vanish.
    largest = tl.max(tl.abs(values), 1)
    scaled = values / tl.where(largest == 0.0, 1.0, largest)[:, None]
    norm = tl.sum(scaled * scaled, 1)
    wanted = _statistic(delta, b, h, r, delta_b, delta_h, delta_s, r < rows, 0.0)
    # out = delta * dout / |dout|^2 = (delta / largest / norm) * scaled; a row of zeros has no gradient at all.
    factor = tl.where(largest == 0.0, 0.0, wanted / tl.where(largest == 0.0, 1.0, largest) / tl.where(norm == 0.0, 1.0, norm))
    _write(out, b, h, r, d, out_b, out_h, out_s, r < rows, factor[:, None] * scaled, DIM)


@triton.jit
def row_statistics(
    dout, out, lse, delta, safe_lse, dout_b, dout_h, dout_s, out_b, out_h, out_s, lse_b, lse_h, lse_s, rows,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    r, h, b = _place(BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    live = r < rows
    product = _values(dout, b, h, r, d, dout_b, dout_h, dout_s, live, DIM) * _values(
        out, b, h, r, d, out_b, out_h, out_s, live, DIM
    )
    tl.store(delta + b * lse_b + h * lse_h + r * lse_s, tl.sum(product, 1), mask=live)
    before = _statistic(lse, b, h, r, lse_b, lse_h, lse_s, live, 0.0)
    tl.store(safe_lse + b * lse_b + h * lse_h + r * lse_s, tl.where(before == -float("inf"), float("inf"), before), mask=live)
