"""Train a byte-level language model on long contexts, the sequence cut over ranks:

    torchrun --nproc-per-node 4 launch/train.py

On two cores this takes between one and two minutes: 40 steps of TokenRing attention over 8,192 bytes of Python source.
Parameters are replicated, each rank holds its rows of every sequence, gradients are summed. What is learned is a function of
the flags, and a resumed run goes on bit by bit where its checkpoint was made. SIGTERM ends the run after the current step, with
a checkpoint. `config` holds the flags, `data` the text, `report` and `plots` what is told of the run.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import plots
import torch
import torch.distributed as dist
import tyro
from config import TrainConfig
from data import read_corpus, windows
from report import Log, print_table, read_metrics, summary
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn import CheckpointError, CommError, InputError, Plan, RingAttnError, make_plan, shard
from ringattn._validation import complaint
from ringattn.checkpoint import store as checkpoint
from ringattn.checkpoint.async_save import Saver
from ringattn.comm.consistency import agree
from ringattn.faults.event_log import note
from ringattn.faults.watchdog import transferring
from ringattn.nn import Decoder, MergingDecoder, reduce_gradients, shift_labels
from ringattn.nn.collectives import sum_over


def main(config: TrainConfig) -> None:
    mesh = ringattn.init(journal=config.journal)
    group = mesh.get_group() if mesh.size() > 1 else None
    agree(group, {"call": "flags"}, complaint(lambda: config.check(mesh.size())))
    speaks = mesh.get_local_rank() == 0
    topology = "cpu" if mesh.device_type == "cpu" else None
    plan = make_plan(
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
    torch.manual_seed(config.seed)
    model = config.model(topology).to(mesh.device_type)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    corpus, identity = _corpus(config, mesh)
    done = 0
    if _prepare(config, speaks):
        done = checkpoint.resume(config.out, model, optimizer, config=identity, any_world=config.any_world)
    stop, stopped, saver = _StopRequest(mesh), False, Saver(config.out, config=identity)
    with Log(config.out / "metrics.jsonl", speaks=speaks, done=done, steps=config.steps) as log:
        size = sum(p.numel() for p in model.parameters())
        log.say(
            f"{plan}\n{size:,} parameters, {len(corpus):,} bytes of text, after step {done} of {config.steps}, in {config.out}"
        )
        for step in range(done + 1, config.steps + 1):
            tokens = windows(corpus, seq_len=config.seq_len, batch=config.batch, seed=config.seed, step=step)
            found = _train_step(model, optimizer, tokens.to(mesh.device_type), plan, mesh, config, step)
            log.step(found)
            note("step", step=step, seconds=found["seconds"])
            stopped = stop.agreed()
            last = stopped or step == config.steps
            if last or (config.save_every and step % config.save_every == 0):
                saver.save(step, model, optimizer)
            if last:
                break
        else:
            log.say(f"nothing to do: step {done} is done and --steps is {config.steps}")
        saver.finish()
        if stopped:
            log.say(f"stopped by SIGTERM; go on with --resume --out {config.out}")
        if stopped or not log.seconds:
            return
    gradient_bytes = sum(p.nbytes for p in model.parameters())
    table = summary(_plans(model, plan), mesh, batch=config.batch, gradient_bytes=gradient_bytes, seconds=log.seconds)
    if speaks:
        print_table(table)
        if config.plots:
            plots.loss_curve(read_metrics(config.out / "metrics.jsonl"), config.out / "loss.png")
            plots.schedule_timeline(plan, config.out / "timeline.png")


def _plans(model: Decoder, plan: Plan) -> list[Plan]:
    """Of every block, in order: those in the middle may have run on a shorter sequence, in the last step."""
    plans = [plan] * len(model.layers)
    if isinstance(model, MergingDecoder) and model.short is not None:
        first, last = model.merging.first, model.merging.last
        plans[first:last] = [model.short.plan] * (last - first)
    return plans


def _train_step(
    model: Decoder,
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
        loss = model.loss(rows, targets, plan, mesh)
    optimizer.zero_grad()
    loss.backward()
    reduce_gradients(model.parameters(), mesh)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # of the sum: the same on all ranks
    lr = config.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    found = {"loss": loss.item(), "bits_per_byte": loss.item() / math.log(2), "gradient_norm": norm.item(), "lr": lr}
    seconds = time.perf_counter() - begin
    return {"step": step, **found, "seconds": seconds, "tokens_per_second": tokens.numel() / seconds}


def _corpus(config: TrainConfig, mesh: DeviceMesh) -> tuple[Tensor, dict[str, Any]]:
    """The text, the same on every rank or an error on every rank, and what identifies this run to its checkpoints."""
    text, problem = torch.empty(0, dtype=torch.uint8), None
    try:
        text = read_corpus(config.data)
    except InputError as error:
        problem = str(error)
    digest = sha256(text.numpy()).hexdigest()[:16]
    group = mesh.get_group() if mesh.size() > 1 else None
    agree(group, {"call": "training", "--data, by its digest": digest}, problem)
    return text, config.identity() | {"text": digest}


def _prepare(config: TrainConfig, speaks: bool) -> bool:
    """Whether to continue from a checkpoint in --out, which is ready. Rank 0 looks and the others believe it."""
    answer: list[bool | str] = [False]
    if speaks:
        try:
            answer = [_checkpoint_to_resume(config) is not None]
        except (CheckpointError, OSError) as error:
            answer = [str(error)]
    with transferring("hearing from rank 0", "rank 0 did not say whether to resume"):
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise CheckpointError(answer[0])
    return answer[0]


def _checkpoint_to_resume(config: TrainConfig) -> Path | None:
    found = checkpoint.latest(config.out)
    if found and (config.resume or config.auto_resume):
        return found
    if config.resume:
        raise CheckpointError(
            f"--resume: there is no complete checkpoint in {config.out}; leave --resume out to start, or correct --out"
        )
    if found or (config.out / "metrics.jsonl").exists():
        numbers = (n for n in range(1, sys.maxsize) if not config.out.with_name(f"{config.out.name}.{n}").exists())
        config.out.rename(config.out.with_name(f"{config.out.name}.{next(numbers)}"))
    config.out.mkdir(parents=True, exist_ok=True)
    return None


class _StopRequest:
    """SIGTERM to any rank, agreed upon by all between two steps. Once noted it is never forgotten, whenever it comes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.noted = mesh, False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.noted = True

    def agreed(self) -> bool:
        return bool(
            sum_over(self.mesh.get_group(), torch.tensor(float(self.noted), device=self.mesh.device_type), "stop request")
        )


def _complain(error: RingAttnError) -> None:
    """One paragraph. What is raised on every rank is said by rank 0 alone, the rest by whom it befell, and where."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if isinstance(error, CommError):
        traceback.print_exception(error)
        print(f"error on rank {rank}: {error}", file=sys.stderr)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """At once: a process whose interpreter shuts down while gloo's threads still let go of tensors may abort instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main(tyro.cli(TrainConfig))
    except RingAttnError as error:
        _complain(error)
        _leave(1)  # without a farewell to peers that may be gone
    dist.destroy_process_group()
    _leave(0)
