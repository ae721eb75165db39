"""Gathers a model's outputs of this rank's rows to the whole sequence, or refuses outputs that have no row dimension.

A model that runs on a shard returns its part of logits and hidden states. Outputs that it computes from "the last row" or "all
rows" (the reward of a sequence classifier, its own loss, the balance of experts) are then those of the shard, and wrong. Row
outputs are recognised by their shape: a floating-point tensor (batch, rows, ...).
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
from ringattn.integrations.transformers.composite.towers import with_towers_set_up
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards
from ringattn.integrations.transformers.seq2seq.stacks import on_stacks
from ringattn.integrations.transformers.support.trial import traced_model_problem, trial_kinds, try_model
from ringattn.sequence.layout import Layout

OF_OTHER_INPUTS = ("encoder_", "image_", "video_", "audio_", "vision_", "text_model_output")  # not of the rows of the sequence

HINT = (
    "Use ringattn.integrations.transformers.forward_whole(model, batch, group), or ringattn.integrations.trainer, which return "
    "the outputs of one process; the mean loss over all ranks is ringattn.nn.cross_entropy(logits, targets, group)"
)


def check_models() -> None:
    """Makes models of transformers check, when given `Shards`, that only attention mixes rows and that outputs are of rows.

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
        if shards.check_outputs and (problem := _input_problem(kwargs, shards, type(self).__name__)):
            agree(
                group_and_rank(shards.group, shards.layout.world)[0], {"call": "inputs of a model"}, problem
            )  # raised on all ranks
        if isinstance(shards, DecoderShards):
            pass  # its stacks check their attention and set positions
        elif not torch.compiler.is_compiling():
            try_model(self, inspect.signature(self.forward).bind_partial(*args).arguments | kwargs, shards)
        elif problem := traced_model_problem(id(self), trial_kinds(shards)):
            raise InputError(problem)
        if not shards.check_outputs:
            return call(self, *args, **kwargs)
        shards.check_outputs = False  # inner models may return anything to this one
        try:
            with on_stacks(self, shards):
                outputs = call(self, *args, **kwargs)
        finally:
            shards.check_outputs = True
        agree_on_rows(outputs, shards, type(self).__name__, HINT)
        return outputs

    checked.checks_rows = True  # type: ignore[attr-defined]
    PreTrainedModel.__call__ = with_towers_set_up(checked)  # type: ignore[method-assign]


def _input_problem(inputs: Mapping[str, Any], shards: Shards, model: str) -> str | None:
    """A message where tokens were added before this rank's rows after sharding, and so on every rank; else None."""
    embeds, rows = inputs.get("inputs_embeds"), max(shards.rows, 1)
    if isinstance(embeds, Tensor) and embeds.ndim > 1 and embeds.shape[1] != rows:
        return (
            f"{model} was given inputs_embeds of {embeds.shape[1]} rows, and this rank holds {rows}: tokens that are added "
            f"after sharding, as by prompt tuning, are on every rank. {HINT}"
        )
    if inputs.get("past_key_values") is not None:
        return (
            f"{model} was given past_key_values after sharding, as by prefix tuning: keys before the sequence cannot be "
            "sharded "
            "over ranks; use LoRA, or prompt tuning with ringattn.integrations.transformers.forward_whole"
        )
    return None


def agree_on_rows(outputs: Any, shards: Shards, model: str, hint: str) -> None:
    """Raises `InputError` on every rank if an output of `model` is not of its rows on any rank; collective."""
    problem = _output_problem(outputs, shards, model, hint)
    if problem is not None or not torch.compiler.is_compiling():  # a rank with few rows may not detect the problem
        group, _ = group_and_rank(shards.group, shards.layout.world)
        agree(group, {"call": "outputs of a model"}, problem)


def _output_problem(outputs: Any, shards: Shards, model: str, hint: str) -> str | None:
    """The output that is not of this rank's rows, as a message, or None."""
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
    """The shards whose rows an output called `name` has; None where it belongs to other inputs, which are not sharded."""
    if isinstance(shards, DecoderShards):
        return shards.of(name)
    return None if name.startswith(OF_OTHER_INPUTS) else shards


def is_rows(tensor: Tensor, shards: Shards) -> bool:
    """Whether the shape is (batch, rows, n, ...). (batch, n) may be n pooled logits, even where n is the number of rows."""
    rows = max(shards.rows, 1)  # a rank without rows runs on one row
    return tensor.ndim > 2 and tensor.shape[1] == rows


def gather_sequence(rows: Tensor, shards: Shards, factor: int = 1) -> Tensor:
    """Gathers rows to the whole sequence in order, on every rank; collective. rows: (batch, rows, ...) of this rank.

    In backward a rank takes its own rows of its gradient, times `factor`: ranks compute the same of the whole sequence and
    have the same gradient, so nothing is sent.

    Raises `InputError` on every rank if `rows` is not of this rank's rows on some rank.
    """
    group, rank = group_and_rank(shards.group, shards.layout.world)
    expected = max(shards.rows, 1)
    problem = None
    if rows.ndim < 2 or rows.shape[1] != expected:
        problem = (
            f"a result of shape {tuple(rows.shape)} is not (batch, {expected}, ...), a result for each row of this rank. {HINT}"
        )
    fields = {"batch": len(rows), "dtype": rows.dtype, "of a row": list(rows.shape[2:])} if problem is None else {}
    agree(group, {"call": "gathering rows"} | fields, problem, device=rows.device)
    sequence: Tensor = _Gather.apply(rows[:, : shards.rows], shards.layout, group, rank, factor)
    return sequence


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
        sequence = torch.cat([part[:, : layout.rows(r)] for r, part in enumerate(parts)], dim=1)
        return sequence[:, sequence_order(layout).to(rows.device)].reshape(len(rows), layout.length, *rows.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad.index_select(1, ctx.own) * ctx.factor, None, None, None, None


class _NotGathered:
    """Marks an output that is not gathered yet, so that rows are never used as the whole sequence."""


class GatheredOutputs(dict[str, Any]):
    """A model's outputs, each gathered to the whole sequence when it is first read; collective.

    Read like a `ModelOutput`: by name, attribute or index. Those that `of_whole` names are not gathered.
    """

    def __init__(self, outputs: Mapping[str, Any], shards: Shards, factor: int, of_whole: Collection[str]) -> None:
        present = {name: value for name, value in outputs.items() if value is not None}
        rows = {name: value for name, value in present.items() if name not in of_whole}
        super().__init__({name: _NotGathered() if name in rows else value for name, value in present.items()})
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
        return self.get(name)  # as in a ModelOutput, missing outputs are None

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
            return tuple(self._whole(name, item) for item in value)
        shards = rows_of(name, self._shards)
        if not isinstance(value, Tensor) or shards is None:
            return value
        return gather_sequence(value, shards, self._factor)


class ScaledGradient(torch.autograd.Function):
    """Returns the same tensor and multiplies its gradient by `factor` in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
