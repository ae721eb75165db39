"""Tests by running a model whether only ringattn's attention mixes rows of a sequence.

A rank runs a model on its own rows. That is correct only where each output row depends on its input row, its position and
attention, and where attention runs in ringattn. Layers with their own attention, convolutions or states along the sequence, and
positions counted from the first row of the rank give wrong results silently, and no config names the models that have them.

So a model is tried once, before its first call: attention is replaced by a row-wise function, and the model runs on a few rows,
then on half of them at the same positions. The inputs of attention must be equal for equal rows. A NaN in the embedding of a
row that was left out reveals any other mixing of rows, also where weights are still zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ringattn.errors import InputError, PlanError
from ringattn.integrations.transformers.batch import Shards

ROWS = 16
ALONE = tuple(range(8, 16))  # rows of the second run, which do not begin at position 0
POISONED = 7  # the row of the first run with a NaN embedding: the one before `ALONE`, which a short convolution reads
OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
CHECKED = "_ringattn_rows_are_independent"

JOINED = "A layer has its own attention, or a convolution or a state along the sequence."
ELSE = (
    "Use a model whose attention goes through transformers' attention interface and whose positions come from position_ids, or "
    "run this one in one process with another attn_implementation"
)


WITHOUT_SHARDS = (
    'attn_implementation="ringattn" needs the whole sequence described: call model(**inputs) with the inputs of '
    "ringattn.integrations.transformers.shard_batch. To generate, or to use the model in one process, first call "
    'model.set_attn_implementation("sdpa")'
)


class Probe:
    """Replaces the `Shards` in a trial, and records the inputs of each attention call."""

    def __init__(self, rows: Tensor | None, shards: Shards | None = None, lenient: bool = False) -> None:
        """rows: the rows to record, or None for all. lenient: whether any mask is accepted, in trials of masks."""
        self.rows, self.blocks, self.lenient = rows, {} if shards is None else shards.blocks, lenient
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []
        self.packed: list[bool] = []  # of each call: whether its mask separates documents

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A row-wise function with the output shape of attention. query, key, value: (batch, heads, rows, head_dim)."""
        recorded = tuple(x if self.rows is None else x.index_select(2, self.rows.to(x.device)) for x in (query, key, value))
        self.calls.append((type(module).__name__, recorded))
        of_rows = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
        return of_rows.contiguous()  # like the output of attention, of which some models take views


def row_mixing_problem(model: Any, kwargs: Mapping[str, Any], rows: int, shards: Shards | None = None) -> str | None:
    """The reason why rows mix outside attention, or None. kwargs: of a call on the `rows` rows of `shards`."""
    name, alone = type(model).__name__, torch.tensor(ALONE)
    full_run, half_run = Probe(alone, shards), Probe(None, shards)
    if joining := next(
        (m for m in model.modules() if isinstance(m, _BatchNorm) and m.training), None
    ):  # in eval mode it does not
        return f"{type(joining).__name__} of {name} takes the mean of this rank's rows in training. {ELSE}"
    try:
        with preserve_state(model):
            with _poisoned_embeddings(model.get_input_embeddings()):
                outputs = model(**small_call(kwargs, rows, torch.arange(ROWS), full_run))
            model(**small_call(kwargs, rows, alone, half_run))
    except (InputError, PlanError) as error:  # an option of a layer is not supported
        if str(error) != WITHOUT_SHARDS:
            return str(error)
        return f"the layers of {name} do not pass the model's keyword arguments on to attention (ringattn=...). {ELSE}"
    except Exception as error:  # of the model: attention outside the interface may use the mask as a tensor
        decoder = getattr(model, "base_model", model)
        if "labels" in kwargs and decoder is not model:  # a replaced head that needs labels
            return row_mixing_problem(decoder, {name: x for name, x in kwargs.items() if name not in OF_THE_LOSS}, rows, shards)
        return f"{name} does not run on some rows of a sequence ({type(error).__name__}: {error}). {ELSE}"
    return _mixing_problem(name, full_run, half_run) or _mixed_outputs_problem(name, outputs)


def _mixing_problem(name: str, full_run: Probe, half_run: Probe) -> str | None:
    """The reason why attention inputs of the same rows differ between both runs, or None."""
    if not full_run.calls:
        return (
            f"no attention of {name} came to ringattn: it was not made with attn_implementation='ringattn', or its layers do "
            f"not use transformers' attention interface. {ELSE}"
        )
    if len(full_run.calls) != len(half_run.calls):
        return (
            f"{name} calls attention {len(full_run.calls)} times for {ROWS} rows and {len(half_run.calls)} for {len(ALONE)}. "
            f"{ELSE}"
        )
    for number, ((layer, actual), (_, expected)) in enumerate(zip(full_run.calls, half_run.calls, strict=True)):
        for kind, a, b in zip(("query", "key", "value"), actual, expected, strict=True):
            if a.isnan().any() and not b.isnan().any():
                return (
                    f"in {name} rows mix outside ringattn: one row's values reached others before attention {number + 1} "
                    f"({layer}). {JOINED} {ELSE}"
                )
            if differ(a, b):
                return (
                    f"the {kind} of attention {number + 1} ({layer}) of {name} depends on which other rows are present: the "
                    "model "
                    f"counts positions from the first row of a rank, or mixes rows outside ringattn. {ELSE}"
                )
    return None


def differ(actual: Tensor, expected: Tensor) -> bool:
    """Whether most rows differ by more than rounding. A few rows may differ where a near tie chose another expert.

    The square root of the dtype's epsilon lies between the rounding of many layers and the effect of another position.
    """
    tolerance = torch.finfo(actual.dtype).eps ** 0.5
    actual, expected = (x.double().transpose(1, 2).flatten(2) for x in (actual, expected))  # (batch, rows, heads * head_dim)
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(error.median() > tolerance)


def _mixed_outputs_problem(model: str, outputs: Any) -> str | None:
    """The reason why rows mix after the last attention, or None."""
    if not isinstance(outputs, Mapping):
        outputs = {f"result {n}": x for n, x in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    others = torch.arange(ROWS) != POISONED
    for name, value in outputs.items():
        for tensor in value if isinstance(value, tuple | list) else (value,):
            of_rows = isinstance(tensor, Tensor) and tensor.ndim > 2 and tensor.shape[1] == ROWS
            if of_rows and tensor[:, others.to(tensor.device)].isnan().any():
                return (
                    f"in {model} rows mix outside ringattn: one row's values reached {name} of others after the last "
                    f"attention. {JOINED} {ELSE}"
                )
    return None


def small_call(kwargs: Mapping[str, Any], rows: int, chosen: Tensor, probe: Probe) -> dict[str, Any]:
    """The arguments of a call on rows at the positions `chosen`, with values of this rank's rows."""
    small_kwargs: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids":
            small_kwargs[name] = chosen.to(value.device).expand(*value.shape[:-1], -1)
        elif not _has_tensors(value):
            small_kwargs[name] = value
        elif isinstance(value, Tensor) and value.dtype != torch.bool and value.ndim > 1 and value.shape[1] == rows:
            small_kwargs[name] = value.index_select(1, (chosen % rows).to(value.device))
            if name == "inputs_embeds" and len(chosen) == ROWS:
                small_kwargs[name][:, POISONED] = float("nan")
    for name in OF_THE_LOSS:
        small_kwargs.pop(name, None)
    return small_kwargs | {"ringattn": probe, "use_cache": False, "return_dict": True}


def _has_tensors(value: Any) -> bool:
    """Whether a value holds tensors; those without row dimension, such as image features, would not fit other rows."""
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


@contextmanager
def _poisoned_embeddings(embeddings: nn.Module) -> Iterator[None]:
    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, POISONED] = float("nan")
        return output

    hook = embeddings.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Disables gradients and dropout, and preserves random state, modes, weights and the autocast cache.

    Modes are set as attributes, since `eval()` may do more, such as merging adapters into weights. The autocast cache is off:
    torch has reused casts made without gradients in the next call, whose parameters then got no gradient.
    """
    training = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for module, _ in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, mode in training:
            module.training = mode
