"""Writes a bug report as one file: the findings of `doctor`, the process environment, and the ends of logs.

    ringattn report runs/train --out report.zip
    torchrun --nproc-per-node 8 -m ringattn report runs/train journal

Nothing is sent. Environment variables are included only if backends, launchers or schedulers read them, and never if the name
suggests a secret; files only if they were named, or lie in named folders and look like logs.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from ringattn.diagnostics.doctor import Finding
from ringattn.errors import InputError

PREFIXES = ("CUDA", "GLOO", "KMP", "LOCAL", "MASTER", "MKL", "NCCL", "OMP", "RANK", "SLURM", "TORCH", "WORLD")
SECRET = ("AUTH", "CRED", "JWT", "KEY", "PASS", "PWD", "SECRET", "TOKEN")
LOGS = (".err", ".json", ".jsonl", ".log", ".out", ".txt")
MAX_DEPTH = 3  # folder levels below a named one
END = 1 << 20  # last bytes of a file that are included


def write(out: Path, findings: Iterable[Finding], paths: Sequence[Path]) -> list[str]:
    """Writes the report to `out`, a zip, and returns the names in it. paths: logs, or folders with logs.

    Raises:
        InputError: one of `paths` does not exist, or `out` cannot be written.
    """
    logs = [log for path in paths for log in _logs(path)]
    files = {
        "doctor.txt": "\n".join(f"{what}: {result}{f' (TO DO: {hint})' if hint else ''}" for what, result, hint in findings),
        "environment.txt": "\n".join(f"{name}={value}" for name, value in relevant_variables(os.environ)),
        "packages.txt": "\n".join(sorted({f"{package.name}=={package.version}" for package in distributions()}, key=str.lower)),
        "system.txt": "\n".join(_system()),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name, text in files.items():
                file.writestr(name, text + "\n")
            for log in logs:
                file.writestr(str(Path("logs", *log.absolute().parts[1:])), _end(log))
            return file.namelist()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error}") from error


def relevant_variables(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The environment variables that may matter and are no secrets."""
    names = (name for name in sorted(environment) if name.startswith(PREFIXES) and not any(word in name for word in SECRET))
    return [(name, environment[name]) for name in names]


def _logs(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; name files or folders with the job's logs, or none")
    if path.is_file():
        return [path]
    candidates = (candidate for candidate in sorted(path.rglob("*")) if len(candidate.relative_to(path).parts) <= MAX_DEPTH)
    return [candidate for candidate in candidates if candidate.is_file() and candidate.suffix in LOGS]


def _end(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - END))
            return file.read()
    except OSError as error:
        return f"cannot be read: {error}".encode()


def _system() -> Iterator[str]:
    """The limits of a process on this host, as far as they are known."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "unknown how many"
    yield f"host: {platform.platform()}, {os.cpu_count()} CPUs, of which {own} for this process"
    for what in ("RLIMIT_AS", "RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "RLIMIT_NPROC"):
        soft, hard = ("no limit" if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(getattr(resource, what)))
        yield f"{what}: {soft}, at most {hard}"
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/proc/sys/net/ipv4/tcp_congestion_control"):
        if Path(file).exists():
            yield f"{file}: {Path(file).read_text().strip()}"
    for folder in ("/dev/shm", "/tmp"):
        if Path(folder).exists():
            yield f"{folder}: {shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
    if shutil.which("nvidia-smi"):
        try:
            yield subprocess.check_output(["nvidia-smi", "-q", "-d", "MEMORY,ECC,CLOCK"], text=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:  # for example where a GPU hangs
            yield f"nvidia-smi: {error}"
