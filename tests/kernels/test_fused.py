"""Fused merges: torch's form against attention over all keys in fp64, Triton's against torch's, and compiled for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meaning import dense
from torch import Tensor

from ringattn import full
from ringattn.kernels import fused
from ringattn.kernels.fused import PartialRows, SumRows, eager_ops, triton_ops

ROOT = Path(__file__).parents[2]
ROWS, KEYS, DIM = 37, 24, 20
# Rows [start, stop) that each part covers; together they leave some rows to one part, to several, and to none.
BOUNDS = {
    "one": [(0, ROWS)],
    "one of some rows": [(5, 30)],
    "two": [(0, ROWS), (0, ROWS)],
    "four": [(0, ROWS)] * 4,
    "seven, some of half the rows": [(0, ROWS), (18, ROWS), (18, ROWS), (0, ROWS), (0, 18), (0, 18), (9, 30)],
    "none of all rows": [(5, 20), (10, 30)],
    "one of them empty": [(0, ROWS), (0, 0)],
}


def parts_and_meaning(bounds: list[tuple[int, int]], dtype: torch.dtype) -> tuple[list[PartialRows], Tensor, Tensor]:
    """Attention to one set of keys per part, and to all of a row's keys at once, in fp64; uncovered rows have no keys."""
    source = torch.Generator().manual_seed(len(bounds))
    q = torch.randn(2, ROWS, 3, DIM, generator=source, dtype=torch.float64)
    sets = [torch.randn(2, 2, KEYS, 3, DIM, generator=source, dtype=torch.float64) for _ in bounds]
    parts = []
    for (k, v), (start, stop) in zip(sets, bounds, strict=True):
        out, lse = dense(q[:, start:stop], k, v, full()) if start < stop else (q[:, :0], q[:, :0, :, 0].transpose(1, 2))
        parts.append(PartialRows(start, stop, out.to(dtype).transpose(1, 2), lse.to(fused.eager_ops.accum_dtype(dtype))))
    out, lse = torch.zeros(2, 3, ROWS, DIM, dtype=torch.float64), torch.full((2, 3, ROWS), -torch.inf, dtype=torch.float64)
    for row in range(ROWS):
        covering = [pair for pair, (start, stop) in zip(sets, bounds, strict=True) if start <= row < stop]
        if covering:
            k, v = (torch.cat(tensors, dim=1) for tensors in zip(*covering, strict=True))
            row_out, row_lse = dense(q[:, row : row + 1], k, v, full())
            out[:, :, row], lse[:, :, row] = row_out.transpose(1, 2)[:, :, 0], row_lse[:, :, 0]
    return parts, out, lse


def largest(x: Tensor, y: Tensor) -> float:
    return torch.where(x == y, 0.0, (x.double() - y.double()).abs()).nan_to_num(nan=torch.inf).max().item()


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_merging_is_attention_to_all_keys(bounds: list[tuple[int, int]]) -> None:
    parts, out, lse = parts_and_meaning(bounds, torch.float64)
    actual = torch.empty_like(out), torch.empty_like(lse)
    fused.merge(parts, *actual)
    # A dozen operations on numbers of size one, each exact to 1.1e-16.
    assert largest(actual[0], out) < 1e-14 and largest(actual[1], lse) < 1e-14


def test_a_part_without_keys_adds_nothing_and_nan_survives() -> None:
    parts, _, _ = parts_and_meaning(BOUNDS["four"], torch.float64)
    for part in parts:
        part.lse[:, :, :3], part.out[:, :, :3] = -torch.inf, 0.0
    parts[1].lse[:, :, 5] = -torch.inf
    parts[2].out[0, 0, 7, 0] = torch.nan
    parts[3].lse[0, 0, 8] = torch.nan
    # A bias of the most negative number is no -inf: a part with such keys outweighs a part without keys.
    for part in parts:
        part.lse[0, 1, 9] = -torch.inf
    parts[0].lse[0, 1, 9] = torch.finfo(torch.float64).min
    out, lse = torch.empty_like(parts[0].out), torch.empty_like(parts[0].lse)
    fused.merge(parts, out, lse)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
    assert out[0, 0, 7, 0].isnan() and out[0, 0, 8].isnan().all() and lse[0, 0, 8].isnan()
    assert out.isnan().sum() == 1 + DIM and lse.isnan().sum() == 1
    assert torch.equal(out[0, 1, 9], parts[0].out[0, 1, 9]) and lse[0, 1, 9] == parts[0].lse[0, 1, 9]


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("to", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_of_rows(bounds: list[tuple[int, int]], to: torch.dtype) -> None:
    dtype = torch.float64 if to == torch.float64 else torch.bfloat16
    parts, _, _ = parts_and_meaning(bounds, dtype)
    expected = torch.zeros(2, 3, ROWS, DIM, dtype=torch.float64)
    for part in parts:
        expected[:, :, part.start : part.stop] += part.out.double()
    total = torch.empty(2, 3, ROWS, DIM, dtype=to)
    fused.add([SumRows(part.start, part.stop, part.out) for part in parts], total)
    # Seven numbers of up to 4 in fp32, then one rounding to `to`.
    assert largest(total, expected.to(to)) <= (1e-14 if to == torch.float64 else 2e-6 if to == torch.float32 else 2**-5)


def test_row_statistics() -> None:
    dout, out = torch.randn(2, 2, 5, 3, DIM, dtype=torch.float64).transpose(2, 3)
    lse = torch.randn(2, 3, 5, dtype=torch.float64)
    lse[0, 1, 2] = -torch.inf
    delta, safe = fused.row_statistics(dout, out, lse)
    assert largest(delta, (dout * out).sum(-1)) < 1e-14
    assert safe[0, 1, 2] == torch.inf and torch.equal(safe.masked_fill(safe == torch.inf, -torch.inf), lse)


TRITON = pytest.mark.skipif(not fused.find_spec("triton"), reason="triton is not installed")


def interpreted() -> None:
    """Run in a separate process: Triton decides at its import whether it interprets."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, bounds in BOUNDS.items():
            parts, _, _ = parts_and_meaning(bounds, dtype)
            for part in parts:
                part.lse[:, :, :2], part.out[:, :, :2] = -torch.inf, 0.0
            shapes = [(2, 3, ROWS, DIM), (2, 3, ROWS)]
            ours, theirs = ([torch.empty(shape) for shape in shapes] for _ in range(2))
            triton_ops.merge(parts, *ours)
            eager_ops.merge(parts, *theirs)
            # exp and log differ by up to 2 roundings between the two, for each of at most seven weights of outs up to 4.
            assert largest(ours[0], theirs[0]) <= 7 * 4 * 2 * 1.2e-7, (name, dtype, largest(ours[0], theirs[0]))
            assert largest(ours[1], theirs[1]) <= 7 * 4 * 1.2e-7, (name, dtype, largest(ours[1], theirs[1]))
            sums = [SumRows(part.start, part.stop, part.out) for part in parts]
            triton_ops.add(sums, ours[0])
            eager_ops.add(sums, theirs[0])
            assert torch.equal(ours[0], theirs[0]), (name, dtype)  # additions in the same order are the same bits
        dout, out = torch.randn(2, 2, ROWS, 3, DIM).to(dtype).transpose(2, 3)
        dout[0, 0, 1], dout[0, 1, 2], dout[0, 1, 3] = 0.0, dout[0, 1, 2] * 2.0**-60, dout[0, 1, 3] * 2.0**60
        lse = torch.randn(2, 3, ROWS)
        lse[0, 1, 2] = -torch.inf
        ours, theirs = (ops.row_statistics(dout, out, lse) for ops in (triton_ops, eager_ops))
        scale = dout.double().norm(dim=-1) * out.double().norm(dim=-1) + 1e-30
        assert (((ours[0] - theirs[0]).abs() / scale) < DIM * 1.2e-7).all() and torch.equal(ours[1], theirs[1])
        surrogate = triton_ops.surrogate_out(dout, theirs[0])
        actual = (dout.double() * surrogate.double()).sum(-1)
        # Each number is rounded once to its dtype, which delta feels in proportion to |dout| |out|.
        assert (((actual - theirs[0]).abs() / scale) <= torch.finfo(dtype).eps).all(), dtype
        assert (surrogate[0, 0, 1] == 0).all()


@TRITON
def test_triton_and_torch_agree() -> None:
    code = "import test_fused; test_fused.interpreted(); print('agreed')"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests' / 'support'}"}
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "agreed", process.stderr


@TRITON
@pytest.mark.parametrize("name", ["merge", "add", "surrogate_out", "row_statistics"])
def test_triton_compiles_for_hopper(name: str) -> None:
    """Down to machine code, which needs no GPU; and launches pass as many arguments as the kernel takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ringattn.kernels.fused import triton_kernels

    kernel = getattr(triton_kernels, name)
    arguments, constants = captured(name)
    kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(arguments) and {*kernel.arg_names} == {*names, *constants}
    signature = {n: kinds[x.dtype] if isinstance(x, Tensor) else "i32" for n, x in zip(names, arguments, strict=True)}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = compile(ASTSource(kernel, signature, constexprs=places), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 0


def captured(name: str) -> tuple[tuple[object, ...], dict[str, int]]:
    """The arguments with which `triton_ops` launches kernel `name`."""
    launches: list[tuple[tuple[object, ...], dict[str, int]]] = []
    out, lse = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ops, "_launch", lambda kernel, grid, args, constants: launches.append((args, constants)))
        if name == "merge":
            triton_ops.merge([PartialRows(0, 8, out, lse)] * 2, out, lse)
        elif name == "add":
            triton_ops.add([SumRows(0, 8, out)] * 2, out)
        elif name == "surrogate_out":
            triton_ops.surrogate_out(out, lse)
        else:
            triton_ops.row_statistics(out, out, lse)
    return launches[0]


def test_torch_takes_over_where_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image without a C compiler: a warning, and the same numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused.triton_runs.cache_clear()
    with pytest.warns(UserWarning, match="merging takes torch's operators instead"):
        assert not fused.triton_runs()
    fused.triton_runs.cache_clear()
