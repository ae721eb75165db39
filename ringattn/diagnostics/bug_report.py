"""What to send with a bug report, as one file: what `doctor` finds, this process's surroundings, and the ends of logs.

    ringattn report runs/train --out report.zip
    torchrun --nproc-per-node 8 -m ringattn report runs/train journal

Nothing is sent anywhere. Of environment variables only those are taken that backends, launchers and schedulers read, and none
whose name speaks of a secret; of files only those that were named, or lie in folders that were, and look like logs.
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

SPOKEN_OF = ("CUDA", "GLOO", "KMP", "LOCAL", "MASTER", "MKL", "NCCL", "OMP", "RANK", "SLURM", "TORCH", "WORLD")
SECRET = ("AUTH", "CRED", "JWT", "KEY", "PASS", "PWD", "SECRET", "TOKEN")
LOGS = (".err", ".json", ".jsonl", ".log", ".out", ".txt")
DEEP = 3  # folders below one that was named
END = 1 << 20  # bytes that are taken of a file, its last


def write(out: Path, findings: Iterable[Finding], paths: Sequence[Path]) -> list[str]:
    """Write the report to `out`, a zip, and return the names in it. `paths`: logs, and folders that hold some.

    Raises:
        InputError: one of `paths` does not exist, or `out` cannot be written.
    """
    logs = [log for path in paths for log in _logs(path)]
    told = {
        "doctor.txt": "\n".join(f"{what}: {found}{f' (TO DO: {hint})' if hint else ''}" for what, found, hint in findings),
        "environment.txt": "\n".join(f"{name}={value}" for name, value in chosen(os.environ)),
        "packages.txt": "\n".join(sorted({f"{one.name}=={one.version}" for one in distributions()}, key=str.lower)),
        "system.txt": "\n".join(_system()),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name, text in told.items():
                file.writestr(name, text + "\n")
            for log in logs:
                file.writestr(str(Path("logs", *log.absolute().parts[1:])), _end(log))
            return file.namelist()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error}") from error


def chosen(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The variables that may matter, and are nobody's secret."""
    names = (name for name in sorted(environment) if name.startswith(SPOKEN_OF) and not any(word in name for word in SECRET))
    return [(name, environment[name]) for name in names]


def _logs(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; name those that hold the job's logs, or none")
    if path.is_file():
        return [path]
    below = (found for found in sorted(path.rglob("*")) if len(found.relative_to(path).parts) <= DEEP)
    return [found for found in below if found.is_file() and found.suffix in LOGS]


def _end(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - END))
            return file.read()
    except OSError as error:
        return f"cannot be read: {error}".encode()


def _system() -> Iterator[str]:
    """What a process may use here, as far as this host tells."""
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
        except (OSError, subprocess.SubprocessError) as error:  # as where a GPU hangs
            yield f"nvidia-smi: {error}"
