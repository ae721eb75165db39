"""Measures what the planner needs: every directed link, whether links share a port, and the speed of attention.

First one pair at a time, all others idle: half a round trip of one byte is the latency, and the additional time of a large
message gives the bandwidth. Then all ranks to all at once: where a rank's total stays clearly below the sum of its links, they
share a port, as behind a switch, and the port's rate is recorded. Last, all ranks run the attention kernel at the same time,
and the slowest counts; likewise a block of a single row, whose time is the launch latency, and a merge, which runs at memory
bandwidth. The best of a few repeats is kept, since disturbances only add time.

A direction's latency is half a round trip, so both directions of a pair are equal. Collective: every rank calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.comm.gloo_duplex import Transfer, finish, prepare, receiving, sending
from ringattn.kernels import Operands, Options, get
from ringattn.kernels.fused import PartialRows, merge
from ringattn.planner.cost import MERGE
from ringattn.planner.topology import Topology
from ringattn.schedule.program import MERGED_AT_ONCE
from ringattn.sequence.segments import FULL, Segment

SHARED = 0.75  # of the sum of its links: a rank with a lower total rate has them behind one port


class Probe:
    """Measures over the ranks of a 1-D `mesh`. nbytes: of a large message; repeats: of each measurement, best kept."""

    def __init__(self, mesh: DeviceMesh, *, nbytes: int = 8 << 20, repeats: int = 3) -> None:
        self.group, self.rank, self.world = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.device, self.nbytes, self.repeats = mesh.device_type, nbytes, repeats
        prepare(self.group)

    def topology(self, name: str = "measured") -> Topology:
        """Measures everything; returns one Topology, the same on every rank."""
        links = torch.zeros(2, self.world, dtype=torch.float64)  # latency and bandwidth from this rank to each other
        for src, dst in permutations(range(self.world), 2):
            self._barrier()
            if self.rank in (src, dst):
                measured = self._pair(src, dst)
                if self.rank == src:
                    links[:, dst] = torch.tensor(measured, dtype=torch.float64)
        by_rank = self._gather(links)  # (world, 2, world)
        total = self._gather(torch.tensor([self._all_at_once()], dtype=torch.float64))[:, 0]
        own = torch.tensor([self._flops(), self._launch(), self._memory()], dtype=torch.float64)
        flops, launch, memory = self._gather(own).unbind(1)
        latencies, bandwidths = by_rank.unbind(1)
        shared = self.world > 1 and bool((total < SHARED * bandwidths.sum(1)).any())
        return Topology(
            name,
            "matrix",
            flops.min().item(),
            world=self.world,
            latencies=tuple(map(tuple, latencies.tolist())),
            bandwidths=tuple(map(tuple, bandwidths.tolist())),
            port=total.min().item() if shared else None,
            launch=launch.max().item(),
            memory=memory.min().item(),
        )

    def _pair(self, src: int, dst: int) -> tuple[float, float]:
        """Latency in s and bandwidth in bytes/s from `src` to `dst`, as measured by `src`."""
        byte, back, large = (self._buffer(n) for n in (1, 1, self.nbytes))
        peer = dst if self.rank == src else src

        def round_trip(message: Tensor) -> None:
            first, then = (self._send, self._receive) if self.rank == src else (self._receive, self._send)
            first(message, peer)
            then(back, peer)

        small = self._best(lambda: round_trip(byte), repeats=5 * self.repeats)
        full = self._best(lambda: round_trip(large))
        return small / 2, self.nbytes / max(full - small, 1e-9)

    def _all_at_once(self) -> float:
        """Bytes/s that leave this rank while every rank sends to every other."""
        if self.world == 1:
            return 0.0
        peers = [(self.rank + offset) % self.world for offset in range(1, self.world)]
        outgoing, incoming = self._buffer(self.nbytes), [self._buffer(self.nbytes) for _ in peers]

        def exchange() -> None:
            sends = [sending(outgoing, self.group, self.rank, peer) for peer in peers]
            receives = [
                receiving(buffer, self.group, self.rank, (self.rank - n) % self.world)
                for n, buffer in enumerate(incoming, start=1)
            ]
            self._wait(sends + receives)

        return len(peers) * self.nbytes / self._best(exchange, together=True)

    def _flops(self) -> float:
        """Attention flop/s of this rank while all compute."""
        on_gpu = self.device == "cuda"
        rows, heads, dim, dtype = (8192, 16, 128, torch.bfloat16) if on_gpu else (1024, 4, 64, torch.float32)
        q, k, v = torch.randn(3, 1, heads, rows, dim, device=self.device, dtype=dtype).unbind()
        kernel, segments = get("sdpa"), (Segment(0, rows, 0, rows, FULL),)
        seconds = self._best(lambda: kernel.forward(Operands(q, k, v, None), segments, Options(dim**-0.5)), together=True)
        return 4 * rows * rows * heads * dim / seconds

    def _launch(self) -> float:
        """Seconds of the smallest kernel call."""
        q, k, v = torch.randn(3, 1, 1, 1, 64, device=self.device).unbind()
        kernel, segments = get("sdpa"), (Segment(0, 1, 0, 1, FULL),)
        return self._best(lambda: kernel.forward(Operands(q, k, v, None), segments, Options(1.0)), together=True)

    def _memory(self) -> float:
        """Bytes/s touched in merging partial results, as many at once as the engine does."""
        out, lse = torch.randn(1, 16, 1024, 64, device=self.device), torch.zeros(1, 16, 1024, device=self.device)
        parts, total = [PartialRows(0, 1024, out, lse)] * MERGED_AT_ONCE, torch.empty_like(out)
        seconds = self._best(lambda: merge(parts, total, torch.empty_like(lse)), together=True)
        return MERGE * total.nbytes * len(parts) / seconds

    def _best(self, action: Callable[[], object], *, repeats: int | None = None, together: bool = False) -> float:
        """Seconds of the fastest run after a warm-up run. together: all ranks start at once."""
        fastest = float("inf")
        for n in range((repeats or self.repeats) + 1):
            if together:
                self._barrier()
            begin = perf_counter()
            action()
            if self.device == "cuda":
                torch.cuda.synchronize()
            fastest = min(fastest, perf_counter() - begin) if n else fastest
        return fastest

    def _send(self, message: Tensor, peer: int) -> None:
        self._wait([sending(message, self.group, self.rank, peer)])

    def _receive(self, message: Tensor, peer: int) -> None:
        self._wait([receiving(message, self.group, self.rank, peer)])

    def _wait(self, ops: Sequence[Transfer]) -> None:
        finish(ops)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def _barrier(self) -> None:
        dist.barrier(self.group)

    def _gather(self, own: Tensor) -> Tensor:
        """Gathers `own` of all ranks, stacked by rank, on the CPU."""
        parts = [torch.empty_like(own, device=self.device) for _ in range(self.world)]
        dist.all_gather(parts, own.to(self.device), group=self.group)
        return torch.stack(parts).cpu()
