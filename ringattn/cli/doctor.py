"""`ringattn doctor`: shows what this machine offers, under torchrun all ranks together, and measures kernels if asked."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from ringattn._validation import count
from ringattn.cli.requirements import require
from ringattn.cli.terminal import console
from ringattn.errors import InputError

if TYPE_CHECKING:
    from ringattn.diagnostics import Finding


def doctor(
    *,
    rank_kernels: bool = False,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    rows: int = 4096,
) -> None:
    """Show what this machine offers, and what to do where ringattn cannot run on it (exit status 1).

    Under torchrun (`torchrun ... -m ringattn doctor`) all ranks are examined together: which can connect to which, whether all
    run the same code, and how fast the links between neighbours are.

    Args:
        rank_kernels: Also measure every kernel that runs here, for make_plan(kernel=...); forward and backward, causal.
        heads: Query heads in that measurement.
        kv_heads: Key and value heads in that measurement.
        head_dim: Of q, k and v in that measurement.
        dtype: Of q, k and v in that measurement.
        rows: Queries and keys in that measurement.
    """
    require("torch")
    findings = examined()
    if not prints_here():
        return  # all have found the same; torchrun ends the others when one exits with an error
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
    if any(finding.hint for finding in findings):
        sys.exit(1)


def examined() -> list[Finding]:
    """The findings on this machine, or under torchrun those of all ranks together."""
    from ringattn.diagnostics import examine, examine_together

    return list(examine_together() if _under_torchrun() else examine())


def prints_here() -> bool:
    """Whether this process is the one that prints: rank 0 under torchrun."""
    return not _under_torchrun() or os.environ["RANK"] == "0"


def _under_torchrun() -> bool:
    from ringattn.diagnostics.doctor import TORCHRUN

    return all(name in os.environ for name in TORCHRUN)


def _ranking(dtype: str, sizes: dict[str, int]) -> Table:
    """Every kernel measured, the fastest first."""
    import torch

    from ringattn.kernels.ranking import rank

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    measured = rank(device, getattr(torch, dtype), **sizes)  # type: ignore[arg-type]
    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    table = Table("kernel", "operator", "forward ms", "backward ms", "", title=f"kernels on {device}, {dtype}, causal, {shape}")
    for timing in measured:
        times = ("", "") if timing.failed else (f"{timing.forward * 1e3:.3g}", f"{timing.backward * 1e3:.3g}")
        table.add_row(timing.kernel, timing.operator, *times, timing.failed)
    return table
