"""Runs the cases of many model types on the ranks of one started job, and writes what becomes of each as a line of JSON.

After each case all ranks exchange how it went through a store that is not the group's, since a case that fails on one rank may
leave the group's collectives out of step. Then, and for every model, the group is made anew.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed import FileStore  # type: ignore[attr-defined]  # documented, and not marked as exported
from transformers import PreTrainedModel

from conformance.batches import batch_for, cases_of
from conformance.corrections import NOT_BUILT
from conformance.double import Double
from conformance.models import build, class_name, config_of
from conformance.verdict import BOUND, Outcome, Result, described, judged, on_this_rank, one_process, own_loss
from ringattn import InputError, PlanError
from ringattn.integrations.transformers import register

LIMIT = 40  # seconds for one case on one rank
LAYOUTS = {1: "contiguous", 2: "zigzag", 3: "contiguous"}


def run(rank: int, job: Job, models: list[tuple[str, str]]) -> None:
    """All cases of these (task, name), on this rank."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    register()
    store = FileStore(f"{job.folder}/board", max(job.worlds))
    store.set_timeout(timedelta(seconds=len(job.worlds) * (LIMIT + job.patience)))
    parent = multiprocessing.parent_process()
    for number, (task, name) in enumerate(models):
        if parent is None or not parent.is_alive():
            return
        if rank == 0:
            Path(job.folder, "reached").write_text(str(number))
        Sweep(rank, job, store, task, name).all_cases()


@dataclass(frozen=True)
class Job:
    """What the ranks of one started job are to do.

    worlds: numbers of ranks, the largest of which is started; folder: scratch for stores; out: the file of results;
    done: (task, name, case, world) that have a result; cases: all of a model's by default; patience: seconds for which ranks
    wait for one that raised; run: what each rank calls.
    """

    worlds: tuple[int, ...]
    folder: str = ""
    out: str = ""
    done: frozenset[tuple[str, str, str, int]] = frozenset()
    cases: tuple[str, ...] | None = None
    patience: int = 15
    run: Callable[[int, Job, list[tuple[str, str]]], None] = run


@dataclass
class Sweep:
    """The cases of one model type on one rank."""

    rank: int
    job: Job
    store: FileStore
    task: str
    name: str

    def all_cases(self) -> None:
        if self.name in NOT_BUILT:
            return self._report("all", 0, Outcome("none", f"cannot be built: {NOT_BUILT[self.name]}"))
        try:
            cases = cases_of(config_of(self.task, self.name), self.job.cases)
            if self.rank == 0:
                self.oracle = build(self.task, self.name)
        except Exception as error:
            return self._report("all", 0, Outcome("none", f"cannot be built: {described(error)}"))
        # one for each number of ranks: what a model remembers of its first call is not to meet another group
        self.ring = {world: self._made("ringattn") for world in self.job.worlds if self.rank < world}
        for case in cases:
            worlds = [w for w in self.job.worlds if (self.task, self.name, case, w) not in self.job.done]
            if worlds:
                self._one_case(case, worlds)
        return None

    def _one_case(self, case: str, worlds: list[int]) -> None:
        if case == "recomputed" and not getattr(transformers, class_name(self.task, self.name)).supports_gradient_checkpointing:
            return self._report(case, 0, Outcome("none", "transformers has no gradient checkpointing for it"))
        whole = one_process(self.oracle, batch_for(self.oracle.config, case)) if self.rank == 0 else Result("ran")
        for world in worlds:
            if self.rank < world:
                model = self._made(None) if case == "switched" else self.ring[world]
                start = time.monotonic()
                self._exchanged(f"{case}/{world}/ready", world, Result("ready"))  # making a model may take longer than patience
                with group(self.job, world, self.rank, f"{self.task} {self.name} {case}"):
                    result = self._ring(model, case, world)
                    results = self._exchanged(
                        f"{case}/{world}", world, result
                    )  # before the group goes: others may still join it
                if self.rank == 0:
                    outcome = judged(whole, [result, *results[1:]])
                    self._report(case, world, outcome, loss=whole.loss, seconds=round(time.monotonic() - start, 2))
        if case == "plain" and self.rank == 0 and whole.kind == "ran":
            self._note_own_loss(whole.loss)
        return None

    def _note_own_loss(self, loss: float) -> None:
        """Whether the model's own loss is another than that of `cross_entropy` on its logits."""
        own = own_loss(self.oracle, batch_for(self.oracle.config, "plain"))
        if not abs(own / loss - 1) < BOUND:
            self._report("own loss", 0, Outcome("note", f"the model's own loss is {own:.6f}, that of its logits {loss:.6f}"))

    def _made(self, attention: str | None) -> PreTrainedModel | Result:
        """A model made with this attention, or switched to ringattn's."""
        try:
            model = build(self.task, self.name, attention)
            if attention is None:
                model.set_attn_implementation("ringattn")
            return model
        except (InputError, PlanError) as error:
            return Result("refused", str(error))
        except Exception as error:
            return Result("failed", f"making the model: {described(error)}")

    def _ring(self, model: PreTrainedModel | Result, case: str, world: int) -> Result:
        """This rank's result on a group of `world` ranks."""
        if isinstance(model, Result):
            return model
        if case == "recomputed":
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), Double())})
        with limited(LIMIT):
            return on_this_rank(model, batch_for(model.config, case), LAYOUTS[world])

    def _exchanged(self, name: str, world: int, result: Result) -> list[Result]:
        """Each rank's kind, text and loss; gradients stay where they are."""
        key = f"{self.task}/{self.name}/{name}"
        self.store.set(f"{key}/{self.rank}", json.dumps([result.kind, result.text, result.loss]))
        return [Result(*json.loads(self.store.get(f"{key}/{n}"))) for n in range(world)]

    def _report(self, case: str, world: int, outcome: Outcome, **more: float) -> None:
        if self.rank:
            return
        line: dict[str, Any] = dict(world=world, task=self.task, type=self.name, case=case)
        line |= {"class": class_name(self.task, self.name), **asdict(outcome), **more}
        with Path(self.job.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def group(job: Job, world: int, rank: int, name: str) -> Iterator[None]:
    """A default group of its own for one case: whatever the last one left behind is gone."""
    store = FileStore(f"{job.folder}/{name.replace(' ', '-')}-{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=job.patience))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """`TimeoutError` in the main thread when time is up."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
