"""Trains: each step draws a sequence, computes loss and gradients on shards, sums gradients and updates; then it reports.

Parameters are replicated, each rank holds its rows of every sequence, gradients are summed. What is learned is a function of
the flags, and a resumed run goes on bit by bit where its checkpoint was made.
"""

from __future__ import annotations

import math
import time
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn import InputError, Plan, make_plan, shard
from ringattn.checkpoint import Saver, resume
from ringattn.cli.train import model, plots
from ringattn.cli.train.config import TrainConfig
from ringattn.cli.train.data import read_corpus, windows
from ringattn.cli.train.report import Log, print_table, read_metrics, summary
from ringattn.cli.train.restart import StopRequest, prepare_directory
from ringattn.comm import agree
from ringattn.faults import note
from ringattn.nn import Decoder, MergingDecoder, reduce_gradients, shift_labels


def train(config: TrainConfig) -> None:
    """The whole run; every rank of the job calls it.

    Raises:
        RingAttnError: what is wrong, on every rank alike; `CommError` on those that outlive another rank.
    """
    mesh = ringattn.init(journal=config.journal)
    _check_flags(config, mesh)
    reports = mesh.get_local_rank() == 0
    topology = "cpu" if mesh.device_type == "cpu" else None
    plan = _plan(config, mesh, topology)
    torch.manual_seed(config.seed)
    decoder = model.build(config, topology).to(mesh.device_type)
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.95))
    corpus, identity = _corpus(config, mesh)
    done = 0
    if prepare_directory(config, reports):
        done = resume(config.out, decoder, optimizer, config=identity, any_world=config.any_world)
    stop, stopped, saver = StopRequest(mesh), False, Saver(config.out, config=identity)
    with Log(config.out / "metrics.jsonl", reports=reports, done=done, steps=config.steps) as log:
        size = sum(p.numel() for p in decoder.parameters())
        log.message(
            f"{plan}\n{size:,} parameters, {len(corpus):,} bytes of text, after step {done} of {config.steps}, in {config.out}"
        )
        for step in range(done + 1, config.steps + 1):
            tokens = windows(corpus, seq_len=config.seq_len, batch=config.batch, seed=config.seed, step=step)
            metrics = _train_step(decoder, optimizer, tokens.to(mesh.device_type), plan, mesh, config, step)
            log.step(metrics)
            note("step", step=step, seconds=metrics["seconds"])
            stopped = stop.on_any_rank()
            last = stopped or step == config.steps
            if last or (config.save_every and step % config.save_every == 0):
                saver.save(step, decoder, optimizer)
            if last:
                break
        else:
            log.message(f"nothing to do: step {done} is done and --steps is {config.steps}")
        saver.finish()
        if stopped:
            log.message(f"stopped by SIGTERM; go on with --resume --out {config.out}")
        if stopped or not log.seconds:
            return
    gradient_bytes = sum(p.nbytes for p in decoder.parameters())
    table = summary(_plans(decoder, plan), mesh, batch=config.batch, gradient_bytes=gradient_bytes, seconds=log.seconds)
    if reports:
        print_table(table)
        if config.plots:
            plots.loss_curve(read_metrics(config.out / "metrics.jsonl"), config.out / "loss.png")
            plots.schedule_timeline(plan, config.out / "timeline.png")


def _check_flags(config: TrainConfig, mesh: DeviceMesh) -> None:
    """Raise `InputError` on every rank where the flags of one cannot work."""
    problem = None
    try:
        config.check()
        model.check_memory(config, mesh.size())
    except InputError as error:
        problem = str(error)
    agree(_group(mesh), {"call": "flags"}, problem)


def _plan(config: TrainConfig, mesh: DeviceMesh, topology: str | None) -> Plan:
    return make_plan(
        config.seq_len,
        world=mesh.size(),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        schedule=config.schedule,
        layout=config.layout,
        ulysses=config.ulysses,
        kernel=config.kernel,
        topology=topology,
    )


def _plans(decoder: Decoder, plan: Plan) -> list[Plan]:
    """Of every block, in order: those in the middle may have run on a shorter sequence, in the last step."""
    plans = [plan] * len(decoder.layers)
    if isinstance(decoder, MergingDecoder) and decoder.short is not None:
        first, last = decoder.merging.first, decoder.merging.last
        plans[first:last] = [decoder.short.plan] * (last - first)
    return plans


def _train_step(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    plan: Plan,
    mesh: DeviceMesh,
    config: TrainConfig,
    step: int,
) -> dict[str, Any]:
    """One step on whole sequences (batch, seq_len), and what to log of it."""
    begin = time.perf_counter()
    rows, targets = shard(tokens, plan), shard(shift_labels(tokens), plan)
    with torch.autocast(mesh.device_type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        loss = decoder.loss(rows, targets, plan, mesh)
    optimizer.zero_grad()
    loss.backward()
    reduce_gradients(decoder.parameters(), mesh)
    norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.clip)  # of the sum: the same on all ranks
    lr = config.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    metrics = {"loss": loss.item(), "bits_per_byte": loss.item() / math.log(2), "gradient_norm": norm.item(), "lr": lr}
    seconds = time.perf_counter() - begin
    return {"step": step, **metrics, "seconds": seconds, "tokens_per_second": tokens.numel() / seconds}


def _corpus(config: TrainConfig, mesh: DeviceMesh) -> tuple[Tensor, dict[str, Any]]:
    """The text, the same on every rank or an error on every rank, and what identifies this run to its checkpoints."""
    text, problem = torch.empty(0, dtype=torch.uint8), None
    try:
        text = read_corpus(config.data)
    except InputError as error:
        problem = str(error)
    digest = sha256(text.numpy().data).hexdigest()[:16]
    agree(_group(mesh), {"call": "training", "--data, by its digest": digest}, problem)
    return text, config.identity() | {"text": digest}


def _group(mesh: DeviceMesh) -> torch.distributed.ProcessGroup | None:
    """The group whose ranks have something to agree on; None where there is one rank."""
    return mesh.get_group() if mesh.size() > 1 else None
