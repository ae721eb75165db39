"""Builds the model that the flags describe, and checks that a rank has memory for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ringattn import InputError
from ringattn.cli.train.config import TrainConfig
from ringattn.nn import Decoder, DecoderConfig, Merging, MergingDecoder


def build(config: TrainConfig, topology: str | None) -> Decoder:
    """With new parameters, from torch's global generator. topology: what attention is planned for, where tokens merge."""
    shape = shape_of(config)
    if config.merge == "none":
        return Decoder(shape)
    first, last = config.merge_layers
    numbers: dict[str, Any] = dict(factor=config.merge_factor, window=config.merge_window, remove=config.merge_remove)
    how: dict[str, Any] = dict(how=config.merge_how) if config.merge != "gate" else {}
    merging = Merging(config.merge, first, last, **numbers, **how, schedule=config.schedule, topology=topology)
    return MergingDecoder(shape, merging)


def shape_of(config: TrainConfig) -> DecoderConfig:
    return DecoderConfig(
        256, config.dim, config.layers, config.heads, config.kv_heads, config.head_dim, config.hidden_dim
    )  # 256 values of a byte


def check_memory(config: TrainConfig, world: int) -> None:
    """Raise `InputError` where the least that one of `world` ranks holds is more than its machine has."""
    tokens, rows = config.batch * config.seq_len, config.batch * (config.seq_len // world)
    kept = 16 * shape_of(config).parameters  # value, gradient and two moments, four bytes each
    streams = 2 * config.layers * rows * config.dim * (2 if config.dtype == "bfloat16" else 4)
    available, needed = available_bytes(), kept + 16 * tokens + streams
    if needed > available:
        raise InputError(
            f"a rank needs {needed / 1e9:,.1f} GB or more ({kept / 1e9:,.1f} for parameters and optimizer, the rest for "
            f"{config.batch:,} x {config.seq_len:,} tokens) and has {available / 1e9:,.1f}: lower --batch, --seq-len, "
            "--layers, --dim, --heads, --head-dim or --hidden-dim, or give the sequence more ranks"
        )


def available_bytes() -> int:
    """Bytes that a rank may have: of its GPU, or its share of the host."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # that of a container, a number or "max"
    allowed = limit.read_text().strip() if limit.exists() else ""
    return min(host, int(allowed) if allowed.isdigit() else host) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
