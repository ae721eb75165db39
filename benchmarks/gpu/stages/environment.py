"""Notes what everything else was measured with: versions, the card, its clocks."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess

import torch
from stage import Stage

import ringattn
from ringattn.kernels import KERNELS, unsupported_reason

ASKED = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current,compute_mode"
PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "flash_attn_3", "flash_attn.cute", "flashinfer", "transformers")


def run(stage: Stage) -> None:
    stage.note(
        ringattn=ringattn.__version__, python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda
    )
    stage.note(cudnn=torch.backends.cudnn.version(), threads=torch.get_num_threads(), machine=platform.machine())
    stage.note(packages={name: version(name) for name in PACKAGES})
    if stage.device.type == "cuda":
        card(stage)
        with stage.guard("a matrix product on the device"):
            x = torch.ones(64, 64, device=stage.device, dtype=torch.bfloat16)
            stage.check(bool((x @ x == 64).all()), "a product of ones is wrong: nothing measured here means anything")
    kernels(stage)


def card(stage: Stage) -> None:
    gpu = torch.cuda.get_device_properties(stage.device)
    stage.note(gpu=gpu.name, capability=f"{gpu.major}.{gpu.minor}", memory_gib=round(gpu.total_memory / 2**30, 1))
    stage.note(multiprocessors=gpu.multi_processor_count, gpus=torch.cuda.device_count())
    free, _ = torch.cuda.mem_get_info(stage.device)
    stage.note(free_gib=round(free / 2**30, 1))
    with stage.guard("the version of NCCL"):
        stage.note(nccl=".".join(map(str, torch.cuda.nccl.version())))
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        words = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
        stage.note(nvidia_smi=[dict(zip(ASKED.split(","), row.split(", "), strict=False)) for row in words])
    else:
        stage.omit("driver and clocks: there is no nvidia-smi")


def kernels(stage: Stage) -> None:
    """What each kernel of the library says of this device, for heads of 128."""
    dtype = torch.bfloat16
    for name in KERNELS:
        why = unsupported_reason(name, stage.device, dtype, 128)
        stage.row("kernels", kernel=name, runs=why is None, why=why or "")


def version(name: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return str(getattr(importlib.import_module(name), "__version__", "there"))
    except Exception as error:  # a package built for another torch or CUDA fails to load in many ways
        return f"does not load: {type(error).__name__}: {str(error)[:200]}"
