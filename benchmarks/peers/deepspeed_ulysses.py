"""DeepSpeed's Ulysses (https://arxiv.org/abs/2309.14509): all-to-all from rows to heads, attention of whole rows, and back.

Where the KV heads do not divide by the ranks it has a path of its own, with uneven splits. Its overlap of projections with
the exchange needs CUDA streams and projections; neither is here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from peers import flash_on_cpu
from peers.base import Attention, Peer, Setting, cut

PACKAGE = "deepspeed"


def peers(setting: Setting) -> Iterator[Peer]:
    yield Peer("DeepSpeed Ulysses", PACKAGE, cut("contiguous"), _demands, _build)


def _demands(setting: Setting) -> str | None:
    if setting.kv_heads < setting.world:
        return f"{setting.kv_heads} KV heads are fewer than {setting.world} ranks"
    return None


def _build(setting: Setting) -> Attention:
    flash_on_cpu.install(setting.flops)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # not a GPU that happens to be there; it has no other way to be told
    from deepspeed.comm import init_distributed
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    # On a CPU it compiles an extension for reductions in shared memory, for a minute; Ulysses reduces nothing.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    init_distributed(dist_backend="gloo", verbose=False)
    # The uneven path asks the model-parallel unit which rank this is, and nothing else.
    groups.mpu = SimpleNamespace(get_sequence_parallel_rank=lambda: setting.rank)
    layer = DistributedAttention(flash_on_cpu.flash_attn_func, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return partial(layer, batch_dim_idx=0, causal=setting.causal)
