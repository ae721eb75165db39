"""The flex kernel: forward by flex_attention itself, backward through a differentiable stand-in with its signature."""

from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from test_kernels import BANDS, assert_same, block, both_passes
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ringattn.kernels import Operands, Options, Rows, flex, get
from ringattn.sequence.mask import END, Band
from ringattn.sequence.segments import CAUSAL, FULL, Segment


def plain(
    query,
    key,
    value,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    kernel_options=None,
    *,
    return_aux=None,
):
    """flex_attention in plain mathematics, which has a backward on the CPU."""
    assert enable_gqa and return_aux.lse and not return_lse
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    grid = torch.meshgrid(*(torch.arange(n) for n in (query.shape[0], heads, rows, keys)), indexing="ij")
    logits = scale * query @ key.mT
    if score_mod is not None:
        logits = score_mod(logits, *grid)
    if block_mask is not None:
        logits = logits.masked_fill(~block_mask.mask_mod(*grid), -torch.inf)
    empty = logits.isneginf().all(-1, keepdim=True)
    lse = logits.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    out = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value
    return out, SimpleNamespace(lse=lse)


@pytest.fixture
def on_stand_in(monkeypatch: pytest.MonkeyPatch) -> flex.Flex:
    kernel = flex.Flex()
    monkeypatch.setattr(kernel, "function", plain)
    monkeypatch.setattr(kernel, "_differentiates", lambda q: True)
    return kernel


def test_the_stand_in_has_the_signature() -> None:
    assert list(signature(plain).parameters) == list(signature(flex_attention).parameters)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_both_passes(band: Band, bias_heads: int | None, softcap: float | None, on_stand_in: flex.Flex) -> None:
    """In one segment and in two, with v of another head size; forward also by flex itself."""
    inputs, options = block(bias_heads=bias_heads, value_dim=12), Options(0.3, softcap)
    for segments in ([Segment(0, 37, 0, 37, band)], [Segment(a, b, a, b, band) for a, b in ((0, 20), (20, 37))]):
        expected = both_passes("reference", inputs, segments, options)
        assert_same(both_passes(on_stand_in, inputs, segments, options), expected)
        with torch.no_grad():
            q, k, v, bias = inputs
            leaves = Operands(*(x.clone().requires_grad_() for x in (q, k, v)), bias)
            assert_same(get("flex").forward(leaves, segments, options), expected[:2])


def test_backward_of_a_block_takes_the_whole_rows_statistics(on_stand_in: flex.Flex) -> None:
    """Two blocks of keys with lse and delta of both together, and a row without keys in either."""
    q, k, v, bias = block(bias_heads=3)
    bias[0, 0] = -torch.inf
    options = Options(0.3, 2.0)
    reference = get("reference").forward(Operands(q, k, v, bias), [Segment(0, 37, 0, 37, FULL)], options)
    dout = torch.randn(reference.out.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    rows = Rows(dout, reference.lse.masked_fill(reference.lse == -torch.inf, torch.inf), (dout * reference.out).sum(-1))
    for keys in (slice(0, 20), slice(20, 37)):
        part = Operands(q, k[:, :, keys], v[:, :, keys], bias[:, :, keys])
        segments = [Segment(0, 37, 0, keys.stop - keys.start, FULL)]
        assert_same(
            on_stand_in.backward(part, rows, segments, options), get("reference").backward(part, rows, segments, options)
        )


@pytest.mark.parametrize("rows, keys", [(37, 37), (300, 300), (256, 384), (400, 260)])
def test_the_blocks_of_a_band_are_those_of_flex(rows: int, keys: int) -> None:
    for band in (CAUSAL, Band(-3, 2), Band(-3, END), Band(0, 0), Band(-200, 150), Band(-129, 129), Band(-END, 130)):
        actual = flex.block_mask(rows, keys, band, torch.device("cpu"))
        left, right = max(band.left, -9999), min(band.right, 9999)

        def in_band(b, h, q, k, left=left, right=right):
            return (k - q >= left) & (k - q <= right)

        expected = create_block_mask(in_band, None, None, rows, keys, device="cpu")
        assert torch.equal(actual.kv_num_blocks, expected.kv_num_blocks)
        assert torch.equal(actual.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert torch.equal(actual.to_dense(), expected.to_dense())
