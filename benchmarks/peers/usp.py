"""yunchang, USP (https://arxiv.org/abs/2405.07719): Ulysses inside groups of ranks, a KV ring between them.

Every way to write the world as ulysses x ring is a peer of its own, with the plain ring (contiguous) and, under a causal mask,
the zigzag ring. Its asynchronous layer is left out: it has no backward and needs CUDA streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from peers import flash_on_cpu
from peers.base import Attention, Peer, Setting, cut, only_causal, sixteen_bits, two_halves
from ringattn.sequence import LAYOUTS, Layout, take

PACKAGE = "yunchang"


def peers(setting: Setting) -> Iterator[Peer]:
    for ulysses in (n for n in range(1, setting.world + 1) if setting.world % n == 0):
        degrees = f"ulysses {ulysses} x ring {setting.world // ulysses}"
        demands, build = partial(_demands, ulysses), partial(_build, ulysses)
        yield Peer(f"yunchang {degrees}", PACKAGE, cut("contiguous"), demands, partial(build, "basic"))
        if ulysses < setting.world:
            zigzag = partial(_demands_of_zigzag, ulysses)
            yield Peer(f"yunchang {degrees}, zigzag", PACKAGE, partial(_zigzag, ulysses), zigzag, partial(build, "zigzag"))


def _demands(ulysses: int, setting: Setting) -> str | None:
    if sixteen_bits(setting):
        return sixteen_bits(setting)
    for name, count in (("heads", setting.heads), ("KV heads", setting.kv_heads)):
        if count % ulysses:
            return f"{count} {name} do not divide by {ulysses}"
    return None


def _demands_of_zigzag(ulysses: int, setting: Setting) -> str | None:
    return _demands(ulysses, setting) or only_causal(setting) or two_halves(setting)


def _zigzag(ulysses: int, setting: Setting) -> Layout:
    """Each group of neighbours holds one zigzag shard of the ring between groups, and its ranks a run of it each."""
    groups = LAYOUTS["zigzag"](setting.seq_len, setting.world // ulysses)
    runs = [divmod(rank, ulysses) for rank in range(setting.world)]
    return Layout(
        f"zigzag of {ulysses}", tuple(take(groups.shards[g], n * setting.rows, (n + 1) * setting.rows) for g, n in runs)
    )


def _build(ulysses: int, ring: str, setting: Setting) -> Attention:
    flash_on_cpu.install(setting.flops)
    import yunchang
    from yunchang.kernels import AttnType
    from yunchang.ring.utils import RingComm

    RingComm.commit = _commit
    yunchang.set_seq_parallel_pg(ulysses, setting.world // ulysses, dist.get_rank(), setting.world)
    layer = yunchang.LongContextAttention(ring_impl_type=ring, attn_type=AttnType.FA)
    return partial(layer, causal=setting.causal)


def _commit(comm: Any) -> None:
    """RingComm.commit, also for a ring of one: its backward sends to itself, which NCCL takes for a copy and gloo refuses."""
    if comm.world_size > 1:
        comm._reqs = dist.batch_isend_irecv(comm._ops)
        return
    for sending, receiving in zip(comm._ops[::2], comm._ops[1::2], strict=True):
        receiving.tensor.copy_(sending.tensor)
    comm._reqs = []
