"""The flash-attn adapters without a GPU: signatures by the packages' sources, shapes by fake tensors, numbers by stand-ins."""

import ast
import importlib.util
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from standins import REQUIRED, SIGNATURES, module
from test_kernels import BANDS, F64, PLAIN, assert_same, block, both_passes
from torch._subclasses.fake_tensor import FakeTensorMode

from ringattn.errors import InputError
from ringattn.kernels import KERNELS, Operands, Options, Rows, get
from ringattn.kernels.adapters import pad_head_dim
from ringattn.kernels.external import parameters
from ringattn.kernels.flash import ANY, Flash, window
from ringattn.sequence.layout import LAYOUTS
from ringattn.sequence.mask import END, Band, causal, documents, full, prefix_lm, sliding_window
from ringattn.sequence.segments import CAUSAL, FULL, Segment, tile_segments

GENERATIONS = tuple(SIGNATURES)
FILES = {
    "flash2": "flash_attn/flash_attn_interface.py",
    "flash3": "hopper/flash_attn_interface.py",
    "flash4": "flash_attn/cute/interface.py",
}


def kernel_class(generation: str) -> type[Flash]:
    kernel = KERNELS[generation.partition(",")[0]]
    assert issubclass(kernel, Flash)
    return kernel


@pytest.fixture
def install_package(monkeypatch: pytest.MonkeyPatch):
    """Install a generation's stand-in where the adapter imports the package; returns the kernel and the stand-in."""

    def install(generation: str) -> tuple[Flash, ModuleType]:
        cls, package = kernel_class(generation), module(generation)
        monkeypatch.setitem(sys.modules, cls.package.module, package)
        return cls(), package

    return install


# ---- signatures


@pytest.fixture
def source_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The source of a package: below the folder `--flash-sources`, or where it is installed."""
    unpacked = request.config.getoption("flash_sources")

    def find(kernel: str) -> Path:
        for folder in [unpacked] if unpacked else [Path(path) for path in sys.path if path]:
            for path in folder.glob(f"{'**/' if unpacked else ''}{FILES[kernel]}"):
                if kernel != "flash4" or not (path.parents[2] / "setup.py").exists():  # flash-attn 2's sdist has an older one
                    return path
        pytest.skip(f"{FILES[kernel]} is not installed, nor below --flash-sources {unpacked or '(not given)'}")

    return find


@pytest.mark.parametrize("kernel", sorted(FILES))
def test_the_signatures_are_those_of_the_real_source(kernel: str, source_of: Callable[[str], Path]) -> None:
    """`pip download` the flash-attn sdist and the flash-attn-4 wheel, unpack both into a folder outside the repository, and
    name it with --flash-sources. (FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE lets pip read the sdist without CUDA.)"""
    tree = ast.parse(source_of(kernel).read_text())
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for name, expected in SIGNATURES[kernel].items():
        actual = [argument.arg for argument in functions[name].args.args]
        assert actual == expected.split(), name
        required = actual[: len(actual) - len(functions[name].args.defaults)]
        assert required == REQUIRED[kernel, name].split(), name


@pytest.mark.parametrize("generation", GENERATIONS)
def test_stand_ins_have_these_signatures_and_adapters_pass_what_is_required(generation: str) -> None:
    package = module(generation)
    calls = [c for c in kernel_class(generation).package.calls if all(f in SIGNATURES[generation] for f in c)]
    for name, expected in SIGNATURES[generation].items():
        assert list(signature(getattr(package, name)).parameters) == expected.split()
        fits = [c[name] for c in calls if set(c[name]) <= set(expected.split())]
        assert len(fits) == 1 and set(REQUIRED[generation, name].split()) <= set(fits[0]), name


def test_a_custom_op_is_known_by_its_function() -> None:
    @torch.library.custom_op("ringattn_test::known", mutates_args=())
    def known(q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        return q * softmax_scale

    assert parameters(known) == ("q", "softmax_scale")


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_a_missing_package_raises_with_a_hint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kernel_class(name).package.module, None)
    with pytest.raises(InputError, match=r"is not installed.*(pip install|setup.py install).*kernel='sdpa'"):
        kernel_class(name)()
    old = ModuleType("old")
    for function in module(name).__dict__.keys() & {f for calls in kernel_class(name).package.calls for f in calls}:
        setattr(old, function, lambda q, k, v: None)
    monkeypatch.setitem(sys.modules, kernel_class(name).package.module, old)
    with pytest.raises(InputError, match="other functions than the versions known here"):
        kernel_class(name)()


# ---- windows


def cells_of_window(rows: int, keys: int, left: int, right: int) -> set[tuple[int, int]]:
    """The cells of a bottom-right aligned window, by its definition."""
    shift = keys - rows
    return {
        (i, j)
        for i in range(rows)
        for j in range(keys)
        if (left == ANY or j >= i + shift - left) and (right == ANY or j <= i + shift + right)
    }


def test_windows_are_bands() -> None:
    """By brute force over every band of a segment: each row attends to a key, and the first and last keys have a row."""
    tried = 0
    for rows in range(1, 7):
        for keys in range(1, 7):
            for left in (-END, *range(-7, 7)):
                for right in (*range(-7, 7), END):
                    cells = {(i, j) for i in range(rows) for j in range(keys) if left <= j - i <= right}
                    if {i for i, _ in cells} != set(range(rows)) or not {0, keys - 1} <= {j for _, j in cells}:
                        continue
                    window_left, window_right = window(rows, keys, Band(left, right))
                    assert window_left >= ANY and window_right >= ANY
                    assert cells_of_window(rows, keys, window_left, window_right) == cells, (rows, keys, left, right)
                    tried += 1
    assert tried > 1000
    assert window(5, 5, CAUSAL) == (ANY, 0) and window(3, 8, FULL) == (ANY, ANY)


MASKS = [full(), causal(), sliding_window(5), sliding_window(3, 4), prefix_lm(9), documents((0, 7, 8, 20, 31))]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_tile_of_every_layout(generation: str, mask, install_package) -> None:
    """All segments that masks and layouts lead to, including varlen calls."""
    kernel, package = install_package(generation)
    source = torch.Generator().manual_seed(0)
    for layout in LAYOUTS.values():
        placed = layout(31, 3)
        for i in range(3):
            for j in range(3):
                parts = tile_segments(placed.shards[i], placed.shards[j], mask)
                if not parts:
                    continue
                q, k, v = (
                    torch.randn(2, h, placed.rows(n), 8, generator=source, dtype=F64) for h, n in ((4, i), (2, j), (2, j))
                )
                inputs = (q, k, v, None)
                assert_same(both_passes(kernel, inputs, parts), both_passes("reference", inputs, parts), 1e-12)
    assert package.calls


def test_documents_are_one_call(install_package) -> None:
    kernel, package = install_package("flash2")
    parts = [Segment(a, b, a, b, CAUSAL) for a, b in ((0, 5), (5, 17), (17, 18), (18, 37))]
    inputs = block(bias_heads=3)
    assert_same(both_passes(kernel, inputs, parts), both_passes("reference", inputs, parts))
    assert package.calls == ["_flash_attn_varlen_forward", "_flash_attn_varlen_backward"]


def test_more_rows_than_keys_are_cut(install_package) -> None:
    """flash-attn 2 takes a window as wide as the keys for none, which would give row 0 too many or too few keys."""
    for band in (Band(-8, 5), Band(-9, 3), Band(-5, END)):
        inputs = [x if n == 0 else x[:, :, :10] for n, x in enumerate(block(rows=15)[:3])]
        for generation in ("flash2", "flash3", "flash4"):
            kernel, _ = install_package(generation)
            parts = [Segment(0, 15, 0, 10, band)]
            assert all(p.rows <= p.keys for p in kernel.refine(parts))
            assert_same(both_passes(kernel, (*inputs, None), parts), both_passes("reference", (*inputs, None), parts))


# ---- arithmetic


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value_dim", [8, 5, 12])
def test_arithmetic_on_stand_ins(generation: str, band: Band, bias_heads, softcap, value_dim: int, install_package) -> None:
    """GQA, bands, biases with empty rows, softcap, and v of another head size; in two segments and in one."""
    kernel, package = install_package(generation)
    inputs = block(bias_heads=bias_heads, value_dim=value_dim)
    for parts in ([Segment(0, 37, 0, 37, band)], [Segment(3, 20, 3, 20, band), Segment(20, 37, 20, 37, band)]):
        for options in (Options(0.3, softcap), Options(-0.7, softcap)):
            assert_same(both_passes(kernel, inputs, parts, options), both_passes("reference", inputs, parts, options))
    assert len(package.calls) == (0 if bias_heads and softcap else 8)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_backward_of_a_block_takes_the_whole_rows_statistics(generation: str, install_package) -> None:
    """Two blocks of keys with lse and delta of both together; a row without keys in either; lse not contiguous."""
    kernel, _ = install_package(generation)
    q, k, v, bias = block(bias_heads=3)
    bias[0, 0] = -torch.inf
    reference = get("reference").forward(Operands(q, k, v, bias), [Segment(0, 37, 0, 37, FULL)], PLAIN)
    dout = torch.randn(reference.out.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    lse = reference.lse.masked_fill(reference.lse == -torch.inf, torch.inf).mT.contiguous().mT
    rows = Rows(dout, lse, (dout * reference.out).sum(-1))
    for keys in (slice(0, 20), slice(20, 37)):
        part = Operands(q, k[:, :, keys], v[:, :, keys], bias[:, :, keys])
        operands = [Segment(0, 37, 0, keys.stop - keys.start, FULL)]
        assert_same(kernel.backward(part, rows, operands, PLAIN), get("reference").backward(part, rows, operands, PLAIN))


# ---- shapes


def fake_passes(kernel: Flash, head_dim: int, value_dim: int, band: Band, count: int, bias: bool) -> None:
    q = torch.empty(2, 9, 37, head_dim, dtype=torch.bfloat16, device="cuda")
    k = torch.empty(2, 3, 37, head_dim, dtype=torch.bfloat16, device="cuda")
    v = torch.empty(2, 3, 37, value_dim, dtype=torch.bfloat16, device="cuda")
    operands = Operands(q, k, v, torch.empty(2, 3, 37, device="cuda") if bias else None)
    rows = torch.empty(2, 9, 37, device="cuda")
    dout = torch.empty(2, 9, 37, value_dim, dtype=torch.bfloat16, device="cuda")
    # On the segments directly: slices of fake tensors need CUDA.
    for out, lse in kernel._run_forward([operands] * count, [band] * count, PLAIN):
        assert (out.shape, out.device.type, out.dtype) == (dout.shape, "cuda", dout.dtype)
        assert (lse.shape, lse.dtype) == (rows.shape, torch.float32)
    for grads in kernel._run_backward([operands] * count, [Rows(dout, rows, rows)] * count, [band] * count, PLAIN):
        assert [g.shape for g in grads if g is not None] == [x.shape for x in operands if x is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("band", [CAUSAL, Band(-3, 2)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_shapes_by_flash_attn_2s_own_fake_operators(
    monkeypatch: pytest.MonkeyPatch, source_of: Callable[[str], Path], band: Band, count: int, bias: bool
) -> None:
    """The package's Python is run as it is, with an empty module for its compiled part: its operators have fakes."""
    path = source_of("flash2")
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", ModuleType("flash_attn_2_cuda"))
    name = KERNELS["flash2"].package.module
    if "ringattn_test_fa2" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ringattn_test_fa2", path)
        real = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(real)
        sys.modules["ringattn_test_fa2"] = real
    monkeypatch.setitem(sys.modules, name, sys.modules["ringattn_test_fa2"])
    with FakeTensorMode():
        fake_passes(KERNELS["flash2"](), 20, 12, band, count, bias)


def test_tensors_off_a_16_byte_boundary_are_copied() -> None:
    with FakeTensorMode():
        buffer = torch.empty(2 * 4 * 8 * 16 + 4, dtype=torch.bfloat16, device="cuda")
        aligned, off = (buffer.as_strided((2, 4, 8, 16), (512, 128, 16, 1), start) for start in (0, 4))
        assert pad_head_dim(aligned, 16) is aligned
        assert pad_head_dim(off, 16).storage_offset() == 0
        assert pad_head_dim(aligned.transpose(1, 2), 16).stride() == aligned.transpose(1, 2).stride()
        odd = torch.empty(2, 4, 8, 18, dtype=torch.bfloat16, device="cuda").narrow(-1, 0, 16)
        assert pad_head_dim(odd, 16).is_contiguous()
