"""`ringattn doctor`, `selftest`, `probe` and `report`: what this machine is, whether kernels are right on it, how fast its
links are, and what to tell others of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table

from ringattn._validation import count, path
from ringattn.cli.console import console
from ringattn.errors import InputError, LaunchError, PlanError
from ringattn.planner.topology import Topology

if TYPE_CHECKING:
    from ringattn.diagnostics.doctor import Finding

MOST_MEGABYTES, MOST_REPEATS = 10_000, 10_000


def doctor(
    *,
    rank_kernels: bool = False,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    rows: int = 4096,
) -> None:
    """Show what this machine offers, and say what to do where ringattn cannot run on it (exit status 1).

    Under torchrun (`torchrun ... -m ringattn doctor`) all ranks are examined together: who reaches whom, whether all run
    the same code, and how fast the links between neighbours are.

    Args:
        rank_kernels: Measure every kernel that runs here, for make_plan(kernel=...); forward and backward, causal.
        heads: Query heads of what is measured.
        kv_heads: Key and value heads of what is measured.
        head_dim: Of q, k and v of what is measured.
        dtype: Of what is measured.
        rows: Queries and keys of what is measured.
    """
    _need_torch()
    findings = _examined()
    if not _speaks():
        return  # all have found the same; whoever exits first with an error has torchrun end the others
    table = Table("what", "found", "what to do", title="ringattn doctor")
    for finding in findings:
        table.add_row(*finding)
    console().print(table)
    if rank_kernels:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rows": rows}
        numbers = {name: count(f"--{name.replace('_', '-')}", value, InputError) for name, value in sizes.items()}
        if heads % kv_heads:
            raise InputError(f"--heads {heads} --kv-heads {kv_heads}: heads must be a multiple of kv_heads")
        console().print(_ranking(dtype, numbers))
    if any(finding.cure for finding in findings):
        sys.exit(1)


def _ranking(dtype: str, sizes: dict[str, int]) -> Table:
    """Every kernel measured, the fastest first."""
    import torch

    from ringattn.kernels.ranking import rank

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    measured = rank(device, getattr(torch, dtype), **sizes)  # type: ignore[arg-type]
    asked = ", ".join(f"{name} {value}" for name, value in sizes.items())
    table = Table("kernel", "operator", "forward ms", "backward ms", "", title=f"kernels on {device}, {dtype}, causal, {asked}")
    for timing in measured:
        times = ("", "") if timing.failed else (f"{timing.forward * 1e3:.3g}", f"{timing.backward * 1e3:.3g}")
        table.add_row(timing.kernel, timing.operator, *times, timing.failed)
    return table


def probe(*, out: Path, megabytes: float = 8.0, repeats: int = 3) -> None:
    """Measure latency and bandwidth of every link and the speed of attention; run it under torchrun, one process for each rank.

    Args:
        out: The topology file to write, for `--topology` and load_topology.
        megabytes: Size of the messages that measure bandwidth; larger on links above 100 GB/s.
        repeats: Times that everything is measured; the best counts.
    """
    if not 0 < megabytes <= MOST_MEGABYTES or not 1 <= repeats <= MOST_REPEATS:
        raise PlanError(
            f"--megabytes {megabytes} --repeats {repeats}: messages must have a size, up to "
            f"{MOST_MEGABYTES:,} MB, and be sent at least once, up to {MOST_REPEATS:,} times"
        )
    import torch.distributed as dist

    from ringattn.diagnostics.probe import Probe
    from ringattn.runtime import init

    mesh = init()
    measured = Probe(mesh, nbytes=int(megabytes * 1e6), repeats=repeats).topology(out.stem)
    if mesh.get_local_rank() == 0:
        measured.save(out)
        console().print(_links(measured))
        ports = "links are independent" if measured.port is None else f"links of a rank share {measured.port / 1e9:.3g} GB/s"
        console().print(f"{ports}; attention at {measured.flops / 1e9:.4g} Gflop/s; written to {out}", highlight=False)
    dist.destroy_process_group()


def report(paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), *, out: Path = Path("ringattn-report.zip")) -> None:
    """Pack what to send with a bug report into one file; under torchrun, started as the job was, rank 0 does it.

    It holds what doctor finds, the environment variables that backends and launchers read (none whose name speaks of a secret),
    packages and their versions, limits, and the ends of logs. Nothing is sent: look at it before you do.

    Args:
        paths: Logs, or folders that hold some: a run's --out, its --journal, what the scheduler wrote.
        out: The file to write.
    """
    _need_torch()
    from ringattn.diagnostics.bug_report import write
    from ringattn.diagnostics.doctor import Finding

    try:
        findings = _examined()
    except LaunchError as error:  # which may be what the report is about
        findings = [Finding("doctor", "fails", str(error))]
    if _speaks():
        names = write(path("--out", out, InputError), findings, paths)
        console().print(f"{out}: {', '.join(names)}", highlight=False)


def selftest(
    *,
    kernel: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] | None = None,
    worlds: tuple[int, ...] = (2, 4, 8),
) -> None:
    """Compare every kernel that runs here with dense attention in fp64, through every schedule (exit status 1 if one is wrong).

    Ranks are simulated in this process; under torchrun (`torchrun ... -m ringattn selftest`) they are real.
    `python -m ringattn selftest` is the same and needs nothing but torch.

    Args:
        kernel: Only these; one that cannot run here counts as a failure.
        device: Where ranks are simulated; a GPU if there is one, by default.
        worlds: Numbers of ranks to simulate.
    """
    _need_torch()
    from ringattn.diagnostics.selftest.run import main

    given = [*(("--kernel", *kernel) if kernel else ()), *(("--device", device) if device else ())]
    sys.exit(main([*given, "--worlds", *map(str, worlds)]))


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise LaunchError(f"torch cannot be imported ({error}); install it with `pip install torch`") from error


def _together() -> bool:
    from ringattn.diagnostics.doctor import TORCHRUN

    return all(name in os.environ for name in TORCHRUN)


def _speaks() -> bool:
    return not _together() or os.environ["RANK"] == "0"


def _examined() -> list[Finding]:
    """What this machine, or under torchrun all ranks together, find."""
    from ringattn.diagnostics.cluster import examine_together
    from ringattn.diagnostics.doctor import examine

    return list(examine_together() if _together() else examine())


def _links(measured: Topology) -> Table:
    table = Table("from", title="latency in µs / bandwidth in GB/s")
    ranks = range(measured.world or 0)
    for dst in ranks:
        table.add_column(f"to {dst}", justify="right")
    for src in ranks:
        cells = (f"{measured.latencies[src][dst] * 1e6:.3g} / {measured.bandwidths[src][dst] / 1e9:.3g}" for dst in ranks)
        table.add_row(str(src), *("" if src == dst else cell for dst, cell in enumerate(cells)))
    return table
