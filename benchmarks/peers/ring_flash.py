"""ring-flash-attn (https://github.com/zhuzilin/ring-flash-attention): KV rings by hops, and all-gather as Llama 3 was trained.

    ring       contiguous; under a causal mask late ranks work while early ones wait
    zigzag     causal only; every rank has the same work
    stripe     causal only; every rank has nearly the same work
    llama3     contiguous; K and V gathered from all ranks, a few heads at a time, the next while these are computed

The llama3 functions take one sequence without a batch dimension. They are offered with one KV head at a time, which is their
documentation's setting and overlaps most, and with all at once, which sends the fewest messages.

The rings are right in 16 bits only: they take `block.to(float32)` for a copy, which in fp32 it is not, so the next block's
gradients overwrite the sum; and ranks that compute nothing in a step would send another dtype than their neighbours expect.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peers import flash_on_cpu
from peers.base import Attention, Peer, Setting, anything, cut, only_causal, sixteen_bits, two_halves

PACKAGE = "ring_flash_attn"


def peers(setting: Setting) -> Iterator[Peer]:
    yield Peer("ring-flash-attn ring", PACKAGE, cut("contiguous"), sixteen_bits, partial(_ring, "ring"))
    yield Peer("ring-flash-attn zigzag", PACKAGE, cut("zigzag"), _zigzag, partial(_ring, "zigzag_ring"))
    yield Peer("ring-flash-attn stripe", PACKAGE, cut("striped"), _striped, partial(_ring, "stripe"))
    for heads in sorted({1, setting.kv_heads}):
        name = f"ring-flash-attn llama3, {heads} head{'s' * (heads > 1)} at a time"
        yield Peer(name, PACKAGE, cut("contiguous"), anything, partial(_llama3, heads))


def _zigzag(setting: Setting) -> str | None:
    return sixteen_bits(setting) or only_causal(setting) or two_halves(setting)


def _striped(setting: Setting) -> str | None:
    # It attends from row 1 on to all but the last key; the CPU operator dies of an empty block.
    return sixteen_bits(setting) or only_causal(setting) or (None if setting.rows > 1 else "needs two rows per rank")


def _ring(kind: str, setting: Setting) -> Attention:
    file = "stripe_flash_attn" if kind == "stripe" else f"{kind}_flash_attn"
    function = getattr(_part(file, setting), f"{file}_func")
    return partial(function, causal=setting.causal)


def _llama3(heads: int, setting: Setting) -> Attention:
    part = _part("llama3_flash_attn_varlen", setting)
    whole = torch.tensor([0, setting.seq_len], dtype=torch.int32)
    cut_to: tuple[Any, ...] = part.llama3_flash_attn_prepare_cu_seqlens(whole, setting.causal, setting.rank, setting.world)
    ends_q, ends_k, longest_q, longest_k, keys = cut_to

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        entry = (x.squeeze(0) for x in (q, k, v))
        given = (ends_q, ends_k, longest_q, longest_k, heads, keys)
        out: Tensor = part.llama3_flash_attn_varlen_func(*entry, *given, causal=setting.causal)
        return out.unsqueeze(0)

    return attention


def _part(file: str, setting: Setting) -> ModuleType:
    """A module of the package, without the package's own __init__: that imports transformers, which nothing here uses."""
    flash_on_cpu.install(setting.flops)
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated", FutureWarning)  # names it uses
    if PACKAGE not in sys.modules:
        spec = find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations is not None
        bare = ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec  # so that it can be found again
        sys.modules[PACKAGE] = bare
    return import_module(f"{PACKAGE}.{file}")
