"""`ringattn probe`: measures every link between the ranks of torchrun and writes a topology file."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ringattn.cli.requirements import require
from ringattn.cli.terminal import console
from ringattn.errors import PlanError
from ringattn.planner import Topology

MOST_MEGABYTES, MOST_REPEATS = 10_000, 10_000


def probe(*, out: Path, megabytes: float = 8.0, repeats: int = 3) -> None:
    """Measure latency and bandwidth of every link and the speed of attention; run it under torchrun, one process for each rank.

    Args:
        out: The topology file to write, for `--topology` and load_topology.
        megabytes: Size of the messages that measure bandwidth; larger on links above 100 GB/s.
        repeats: How often everything is measured; the best counts.
    """
    if not 0 < megabytes <= MOST_MEGABYTES or not 1 <= repeats <= MOST_REPEATS:
        raise PlanError(
            f"--megabytes {megabytes} --repeats {repeats}: messages must have a size, up to "
            f"{MOST_MEGABYTES:,} MB, and be sent at least once, up to {MOST_REPEATS:,} times"
        )
    require("torch")
    import torch.distributed as dist

    from ringattn.diagnostics import Probe
    from ringattn.runtime import init

    mesh = init()
    measured = Probe(mesh, nbytes=int(megabytes * 1e6), repeats=repeats).topology(out.stem)
    if mesh.get_local_rank() == 0:
        measured.save(out)
        console().print(_links(measured))
        ports = "links are independent" if measured.port is None else f"links of a rank share {measured.port / 1e9:.3g} GB/s"
        console().print(f"{ports}; attention at {measured.flops / 1e9:.4g} Gflop/s; written to {out}", highlight=False)
    dist.destroy_process_group()


def _links(measured: Topology) -> Table:
    table = Table("from", title="latency in µs / bandwidth in GB/s")
    ranks = range(measured.world or 0)
    for dst in ranks:
        table.add_column(f"to {dst}", justify="right")
    for src in ranks:
        cells = (f"{measured.latencies[src][dst] * 1e6:.3g} / {measured.bandwidths[src][dst] / 1e9:.3g}" for dst in ranks)
        table.add_row(str(src), *("" if src == dst else cell for dst, cell in enumerate(cells)))
    return table
