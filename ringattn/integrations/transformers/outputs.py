"""Gathers what a model returns for this rank's rows to the whole sequence, or refuses what is not a tensor of rows.

A model that runs on a part of a sequence returns a part of its logits and hidden states. What it takes from "the last row" or
"all rows" (the reward of a sequence classifier, its own loss, the balance of experts) is then that of the part, and wrong.
Results are recognised by their shape: a floating-point tensor (batch, rows, ...) has a result for each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ringattn.comm.collectives import all_gather
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import group_and_rank
from ringattn.errors import InputError
from ringattn.execution.sharding import resident_positions, sequence_order
from ringattn.faults.watchdog import comm_errors
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.composite.towers import minding_towers
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards
from ringattn.integrations.transformers.seq2seq.stacks import on_stacks
from ringattn.integrations.transformers.support.trial import kinds_of, problem_while_traced, try_model
from ringattn.sequence.layout import Layout

OF_OTHER_INPUTS = ("encoder_", "image_", "video_", "audio_", "vision_", "text_model_output")  # not of the rows of the sequence

HINT = (
    "Use ringattn.integrations.transformers.forward_whole(model, batch, group), or ringattn.integrations.trainer, which return "
    "what one process does; a mean loss over all ranks is ringattn.nn.cross_entropy(logits, targets, group)"
)


def check_models() -> None:
    """Let models of transformers that are given `Shards` check that rows meet in ringattn alone, and that they return rows.

    Idempotent.
    """
    call: Callable[..., Any] = PreTrainedModel.__call__
    if getattr(call, "checks_rows", False):
        return

    @wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        shards = kwargs.get("ringattn")
        if not isinstance(shards, Shards):
            return call(self, *args, **kwargs)
        if shards.check_outputs and (problem := _unlike_cut(kwargs, shards, type(self).__name__)):
            agree(group_and_rank(shards.group, shards.layout.world)[0], {"call": "inputs of a model"}, problem)  # all hear it
        if isinstance(shards, DecoderShards):
            pass  # its stacks make sure that attention comes here, and see to positions
        elif not torch.compiler.is_compiling():
            try_model(self, inspect.signature(self.forward).bind_partial(*args).arguments | kwargs, shards)
        elif problem := problem_while_traced(id(self), kinds_of(shards)):
            raise InputError(problem)
        if not shards.check_outputs:
            return call(self, *args, **kwargs)
        shards.check_outputs = False  # models within this one return what they like to it
        try:
            with on_stacks(self, shards):
                outputs = call(self, *args, **kwargs)
        finally:
            shards.check_outputs = True
        agree_on_rows(outputs, shards, type(self).__name__, HINT)
        return outputs

    checked.checks_rows = True  # type: ignore[attr-defined]
    PreTrainedModel.__call__ = minding_towers(checked)  # type: ignore[method-assign]


def _unlike_cut(inputs: Mapping[str, Any], shards: Shards, model: str) -> str | None:
    """What was put before this rank's rows after the cut, and so stands before those of every rank; or None."""
    embeds, rows = inputs.get("inputs_embeds"), max(shards.rows, 1)
    if isinstance(embeds, Tensor) and embeds.ndim > 1 and embeds.shape[1] != rows:
        return (
            f"{model} was given inputs_embeds of {embeds.shape[1]} rows, and this rank holds {rows}: tokens that are added "
            f"after the cut, as by prompt tuning, stand on every rank. {HINT}"
        )
    if inputs.get("past_key_values") is not None:
        return (
            f"{model} was given past_key_values after the cut, as by prefix tuning: keys before the sequence cannot be cut "
            "over ranks; use LoRA, or prompt tuning with ringattn.integrations.transformers.forward_whole"
        )
    return None


def agree_on_rows(outputs: Any, shards: Shards, model: str, hint: str) -> None:
    """Raise `InputError` on every rank if on some rank a result of `model` is not of its rows; collective."""
    problem = _unlike_rows(outputs, shards, model, hint)
    if problem is not None or not torch.compiler.is_compiling():  # ranks that hold few rows may find no fault alone
        group, _ = group_and_rank(shards.group, shards.layout.world)
        agree(group, {"call": "outputs of a model"}, problem)


def _unlike_rows(outputs: Any, shards: Shards, model: str, hint: str) -> str | None:
    """Which result is not of this rank's rows, or None."""
    if not isinstance(outputs, Mapping):
        outputs = dict(enumerate(outputs if isinstance(outputs, tuple) else (outputs,)))
    for name, value in outputs.items():
        if isinstance(name, str) and name.startswith(OF_OTHER_INPUTS):
            continue
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_rows(tensor, shards):
                return (
                    f"{model} returned {name} of shape {tuple(tensor.shape)}, not a result for each of this rank's rows: it is "
                    f"pooled over one rank's rows and differs from that of the whole sequence. {hint}"
                )
    return None


def rows_of(name: str, shards: Shards) -> Shards | None:
    """The shards that a result called `name` has rows of; None where it is of other inputs, which were not cut."""
    if isinstance(shards, DecoderShards):
        return shards.of(name)
    return None if name.startswith(OF_OTHER_INPUTS) else shards


def is_rows(tensor: Tensor, shards: Shards) -> bool:
    """Whether it is (batch, rows, n, ...). (batch, n) may be a pooled head's n logits even where n is the number of rows."""
    rows = max(shards.rows, 1)  # a rank without rows runs on one
    return tensor.ndim > 2 and tensor.shape[1] == rows


def gathered(rows: Tensor, shards: Shards, factor: int = 1) -> Tensor:
    """The whole sequence on every rank, in order; collective. rows: (batch, rows, ...) of this rank.

    In backward a rank takes its own rows out of its gradient of the whole, times `factor`: ranks that compute the same of the
    whole have the same gradient, so nothing has to be sent.

    Raises `InputError` on every rank if `rows` is not of this rank's rows on some rank.
    """
    group, rank = group_and_rank(shards.group, shards.layout.world)
    wanted = max(shards.rows, 1)
    problem = None
    if rows.ndim < 2 or rows.shape[1] != wanted:
        problem = (
            f"a result of shape {tuple(rows.shape)} is not (batch, {wanted}, ...), a result for each row of this rank. {HINT}"
        )
    said = {"batch": len(rows), "dtype": rows.dtype, "of a row": list(rows.shape[2:])} if problem is None else {}
    agree(group, {"call": "gathering rows"} | said, problem, device=rows.device)
    whole: Tensor = _Gather.apply(rows[:, : shards.rows], shards.layout, group, rank, factor)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout, group: dist.ProcessGroup | None, rank: int, factor: int) -> Tensor:
        ctx.own, ctx.factor = resident_positions(layout, rank).to(rows.device), factor
        if group is None:
            return rows[:, sequence_order(layout).to(rows.device)]
        most = max(layout.rows(r) for r in range(layout.world))
        flat = rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2)
        padded = F.pad(flat, (0, 0, 0, most - rows.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(layout.world)]
        with comm_errors("gathering rows", f"rank {rank}: gathering the rows of a model's results failed"):
            all_gather(parts, padded, group)
        whole = torch.cat([part[:, : layout.rows(r)] for r, part in enumerate(parts)], dim=1)
        return whole[:, sequence_order(layout).to(rows.device)].reshape(len(rows), layout.length, *rows.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad.index_select(1, ctx.own) * ctx.factor, None, None, None, None


class _Unread:
    """Stands in the dict for what was not gathered yet, so that nothing takes rows for the whole."""


class GatheredOutputs(dict[str, Any]):
    """A model's outputs of this rank's rows, each gathered to the whole sequence when it is first read; collective.

    Read as a `ModelOutput`: by name, attribute or number. Those that `of_whole` names are of the whole sequence already.
    """

    def __init__(self, outputs: Mapping[str, Any], shards: Shards, factor: int, of_whole: Collection[str]) -> None:
        present = {name: value for name, value in outputs.items() if value is not None}
        rows = {name: value for name, value in present.items() if name not in of_whole}
        super().__init__({name: _Unread() if name in rows else value for name, value in present.items()})
        vars(self).update(_rows=rows, _shards=shards, _factor=factor)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key in self._rows:
            self[key] = self._whole(key, self._rows[key])
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._rows.pop(key, None)
        super().__setitem__(key, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)  # what a model did not return is None in a ModelOutput

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __iter__(self) -> Iterator[str]:  # overridden: dict(outputs) and **outputs then read by __getitem__
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self[key] = self[key]
        return super().pop(key, *default)

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def _whole(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(self._whole(name, one) for one in value)
        shards = rows_of(name, self._shards)
        if not isinstance(value, Tensor) or shards is None:
            return value
        return gathered(value, shards, self._factor)


class ScaledGradient(torch.autograd.Function):
    """The same tensor, whose gradient is multiplied by `factor` on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
