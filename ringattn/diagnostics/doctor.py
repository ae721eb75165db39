"""Examines this machine: what is installed, whether kernels and backends work, and a hint for whatever does not.

It tests instead of reading versions: the attention kernel computes a small block, compared with the reference, and gloo opens a
group of one, which fails where the hostname does not resolve. It needs no torchrun and changes nothing. What only all ranks
together can test is in `cluster`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

import ringattn
from ringattn.comm.process_group import describe_backends
from ringattn.kernels import KERNELS, Operands, Options, get
from ringattn.kernels.select import pick, resolved, unsupported_reason
from ringattn.sequence.segments import CAUSAL, Segment

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Finding(NamedTuple):
    """One line of the report. A hint means that ringattn cannot run without a change."""

    what: str
    outcome: str
    hint: str = ""


def examine() -> Iterator[Finding]:
    """Yields all findings, from general to specific."""
    yield Finding("python", platform.python_version())
    yield Finding("ringattn", ringattn.__version__)
    yield Finding("torch", torch.__version__)
    yield _backends()
    yield _devices()
    yield from _sdpa()
    yield from _other_kernels()
    yield from _auto()
    yield _gloo()
    yield _torchrun()
    for name in INTERFACES:
        yield Finding(name, os.environ.get(name, "not set: the backend chooses"))
    yield _memory()


def _backends() -> Finding:
    if not dist.is_available():
        return Finding("backends", "none", "this torch was built without torch.distributed; install an official build")
    available = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]
    return Finding(
        "backends", ", ".join(available), "" if available else "this torch has no backend; install an official build"
    )


def _devices() -> Finding:
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    cpus = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads for each process"
    return Finding("devices", f"{cpus}; {', '.join(gpus) or 'no GPU'}")


def _sdpa() -> Iterator[Finding]:
    """Reports which operator "sdpa" is here, and whether its results are right. All other kernels are optional."""
    hint = "make plans with kernel='reference', and report this torch version"
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        what = f"sdpa kernel, {_short(dtype)}"
        try:
            off = _error_of("sdpa", dtype)
        except (RuntimeError, AttributeError) as error:  # AttributeError: this torch has no such operator
            yield Finding(what, f"fails: {error}", hint)
            continue
        name = resolved("sdpa", _device(), dtype, 16, 16, 2)
        yield Finding(what, f"{name} on {_device().type}, within {off:.0e} of the reference", "" if off < tolerance else hint)


def _other_kernels() -> Iterator[Finding]:
    """Reports whether kernels that plans may name run here, or why not. None is required, so none has a hint."""
    for name in KERNELS:
        if name in ("sdpa", "reference"):
            continue
        why = unsupported_reason(name, _device(), torch.bfloat16, 16)
        if why is None:
            try:
                result = f"runs, within {_error_of(name, torch.bfloat16):.0e} of the reference"
            except Exception as error:  # packages may raise any type; the other kernels are still tested
                result = f"there, but fails: {error}"
        else:
            result = why.removeprefix(f"kernel {name!r}").lstrip(": ")
            for suffix in ("; make the plan with kernel='sdpa'", ", or make the plan with kernel='sdpa'"):
                result = result.removesuffix(suffix)
        yield Finding(f"{name} kernel", result)


def _auto() -> Iterator[Finding]:
    """Reports the default operator on each device, and a kernel that is worth measuring."""
    name, why = pick(_device(), torch.bfloat16, 128)
    suggestion = "" if name == "sdpa" else f"; try kernel={name!r} ({why}), or measure with `ringattn doctor --rank-kernels`"
    yield Finding("kernel='auto'", f"means sdpa on every rank and machine{suggestion}")
    for device in _devices_to_examine():
        for dtype, dims in _HEAD_SIZES.items():
            sizes: dict[str, list[str]] = {}
            for dim in dims:
                sizes.setdefault(_default(device, dtype, dim), []).append(str(dim))
            result = ", ".join(f"{operator} for {' and '.join(which)}" for operator, which in sizes.items())
            yield Finding(f"default on {device}, {_short(dtype)}", result if len(sizes) > 1 else next(iter(sizes)))


_HEAD_SIZES = {torch.bfloat16: (64, 128, 256), torch.float32: (128,)}  # head sizes


def _default(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """The operator for a head size, and those for bands and of torch's own attention where they differ."""
    plain, band = (resolved("sdpa", device, dtype, dim, dim, 1, bands=bands) for bands in (False, True))
    others = [] if plain == band else [f"{band} for bands"]
    own = _torchs_own(device, dtype, dim) if device.type == "cuda" else plain
    if own != plain:
        others.append(f"torch itself: {own}")
    return f"{plain} ({', '.join(others)})" if others else plain


def _torchs_own(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """The operator that scaled_dot_product_attention uses here in training."""
    try:
        q = torch.empty(1, 1, 64, dim, device=device, dtype=dtype, requires_grad=True)
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().removesuffix("_attention")
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:  # a private function, which may change
        return f"unknown, {error}"


def _devices_to_examine() -> list[torch.device]:
    gpus = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return gpus or [torch.device("cpu")]


def _error_of(name: str, dtype: torch.dtype) -> float:
    """The error of a small block against the reference."""
    segments, options = (Segment(0, 33, 0, 33, CAUSAL),), Options(0.25)
    q, k, v = torch.randn(3, 1, 2, 33, 16, generator=torch.Generator().manual_seed(0)).to(_device(), dtype).unbind()
    actual, expected = (get(n).forward(Operands(q, k, v, None), segments, options).out.float() for n in (name, "reference"))
    return (actual - expected).abs().max().item()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gloo() -> Finding:
    hint = "let this host's name resolve to an address of its own, or set GLOO_SOCKET_IFNAME to an interface (see `ip link`)"
    members = dist.group.WORLD if dist.is_initialized() else None
    if members is not None:
        return Finding("gloo", f"in a group, {describe_backends(members)}")
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        return Finding("gloo", f"cannot open a group: {error}", hint)
    return Finding("gloo", "opens a group")


def _torchrun() -> Finding:
    available = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    missing = [name for name in TORCHRUN if name not in available]
    if not available:
        return Finding("torchrun", "not under torchrun (one process; start ranks with `torchrun --nproc-per-node N ...`)")
    hint = f"{', '.join(missing)} not set: start every rank with torchrun, or set all of them" if missing else ""
    return Finding("torchrun", ", ".join(f"{name}={value}" for name, value in available.items()), hint)


def _memory() -> Finding:
    sizes = []
    try:
        with open("/proc/meminfo") as meminfo:
            free = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
        sizes.append(f"{free / 2**20:.1f} GiB on the host")
    except (OSError, StopIteration):
        sizes.append("unknown on the host (no /proc/meminfo)")
    if torch.cuda.is_available():
        sizes += [f"{torch.cuda.mem_get_info(n)[0] / 2**30:.1f} GiB on GPU {n}" for n in range(torch.cuda.device_count())]
    return Finding("free memory", ", ".join(sizes))
