"""Finds out, by running it, whether a model leaves everything that joins rows of a sequence to ringattn.

A rank runs a model on its own rows. That is right only where each row's result hangs on that row, its position and attention,
and attention comes to ringattn. Layers with attention of their own, convolutions or states along the sequence, and positions
counted from the first row of the rank give wrong numbers without a word, and no config says which models have them.

So a model is tried once, before its first call: attention is replaced by a function of each row alone, and the model runs on a
few rows, then on half of them at the same positions. What reaches attention must be the same for the same rows. A NaN in the
embedding of a row that was left out shows whatever else joins rows, also where weights are zero so far.
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
ALONE = tuple(range(8, 16))  # rows of the second run, which begin at another position than that of a rank's first row
POISONED = 7  # the row of the first run whose embedding is NaN: the one before them, which a short convolution reaches back to
OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")
CHECKED = "_ringattn_rows_are_independent"

JOINED = "A layer has attention of its own, or a convolution or a state along the sequence."
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
    """Stands where a model carries its `Shards`, and keeps what each layer would have given to attention."""

    def __init__(self, rows: Tensor | None, shards: Shards | None = None, lenient: bool = False) -> None:
        """rows: which ones to keep, or all. lenient: whether masks may say what they like, since they are what is tried."""
        self.rows, self.blocks, self.lenient = rows, {} if shards is None else shards.blocks, lenient
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []
        self.packed: list[bool] = []  # of each call: whether its mask tells documents apart

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A function of each row alone, of the shape that attention has. query, key, value: (batch, heads, rows, head_dim)."""
        kept = tuple(x if self.rows is None else x.index_select(2, self.rows.to(x.device)) for x in (query, key, value))
        self.calls.append((type(module).__name__, kept))
        of_rows = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
        return of_rows.contiguous()  # as what attention returns, of which some models take views


def joined_rows(model: Any, kwargs: Mapping[str, Any], rows: int, shards: Shards | None = None) -> str | None:
    """What joins rows outside attention, or None. kwargs: of a call on `rows` rows, which are those of `shards`."""
    name, alone = type(model).__name__, torch.tensor(ALONE)
    whole, some = Probe(alone, shards), Probe(None, shards)
    if joining := next((m for m in model.modules() if isinstance(m, _BatchNorm) and m.training), None):  # not so in eval mode
        return f"{type(joining).__name__} of {name} takes the mean of this rank's rows in training. {ELSE}"
    try:
        with undisturbed(model):
            with _poison(model.get_input_embeddings()):
                outputs = model(**few_rows(kwargs, rows, torch.arange(ROWS), whole))
            model(**few_rows(kwargs, rows, alone, some))
    except (InputError, PlanError) as error:  # what a layer asks for cannot be cut
        if str(error) != WITHOUT_SHARDS:
            return str(error)
        return f"the layers of {name} do not hand on to attention what the model is given (ringattn=...). {ELSE}"
    except Exception as error:  # of the model: attention that is not the interface's may take its mask for a tensor
        decoder = getattr(model, "base_model", model)
        if "labels" in kwargs and decoder is not model:  # a head that was put in place of the model's, and needs them
            return joined_rows(decoder, {name: x for name, x in kwargs.items() if name not in OF_THE_LOSS}, rows, shards)
        return f"{name} does not run on some rows of a sequence ({type(error).__name__}: {error}). {ELSE}"
    return _unlike(name, whole, some) or _poisoned_outputs(name, outputs)


def _unlike(name: str, whole: Probe, some: Probe) -> str | None:
    """Where the same rows came to attention otherwise among others than alone, or None."""
    if not whole.calls:
        return (
            f"no attention of {name} came to ringattn: it was not made with attn_implementation='ringattn', or its layers do "
            f"not use transformers' attention interface. {ELSE}"
        )
    if len(whole.calls) != len(some.calls):
        return f"{name} calls attention {len(whole.calls)} times for {ROWS} rows and {len(some.calls)} for {len(ALONE)}. {ELSE}"
    for number, ((layer, found), (_, expected)) in enumerate(zip(whole.calls, some.calls, strict=True)):
        for kind, a, b in zip(("query", "key", "value"), found, expected, strict=True):
            if a.isnan().any() and not b.isnan().any():
                return (
                    f"in {name} rows meet outside ringattn: what one row holds reached others before attention {number + 1} "
                    f"({layer}). {JOINED} {ELSE}"
                )
            if apart(a, b):
                return (
                    f"the {kind} of attention {number + 1} ({layer}) of {name} hangs on which other rows are there: the model "
                    f"counts positions from the first row of a rank, or joins rows outside ringattn. {ELSE}"
                )
    return None


def apart(found: Tensor, expected: Tensor) -> bool:
    """Whether most rows differ by more than rounding. A row that another expert was chosen for, by a hair, is not most rows.

    The square root of the dtype's unit lies between what rounding does over many layers and what another position does.
    """
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    found, expected = (x.double().transpose(1, 2).flatten(2) for x in (found, expected))  # (batch, rows, heads * head_dim)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(error.median() > tolerance)


def _poisoned_outputs(model: str, outputs: Any) -> str | None:
    """What joins rows after the last attention, or None."""
    if not isinstance(outputs, Mapping):
        outputs = {f"result {n}": x for n, x in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    others = torch.arange(ROWS) != POISONED
    for name, value in outputs.items():
        for tensor in value if isinstance(value, tuple | list) else (value,):
            of_rows = isinstance(tensor, Tensor) and tensor.ndim > 2 and tensor.shape[1] == ROWS
            if of_rows and tensor[:, others.to(tensor.device)].isnan().any():
                return (
                    f"in {model} rows meet outside ringattn: what one row holds reached {name} of others after the last "
                    f"attention. {JOINED} {ELSE}"
                )
    return None


def few_rows(kwargs: Mapping[str, Any], rows: int, chosen: Tensor, probe: Probe) -> dict[str, Any]:
    """The call's arguments for rows that stand at the positions `chosen`, with what this rank's rows hold."""
    few: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_ids":
            few[name] = chosen.to(value.device).expand(*value.shape[:-1], -1)
        elif not _has_tensors(value):
            few[name] = value
        elif isinstance(value, Tensor) and value.dtype != torch.bool and value.ndim > 1 and value.shape[1] == rows:
            few[name] = value.index_select(1, (chosen % rows).to(value.device))
            if name == "inputs_embeds" and len(chosen) == ROWS:
                few[name][:, POISONED] = float("nan")
    for name in OF_THE_LOSS:
        few.pop(name, None)
    return few | {"ringattn": probe, "use_cache": False, "return_dict": True}


def _has_tensors(value: Any) -> bool:
    """Tensors that are not of rows, such as what a vision tower found for some of them, would not fit other rows."""
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


@contextmanager
def _poison(embeddings: nn.Module) -> Iterator[None]:
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
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; random numbers, modes, weights and casts go on as if nothing had been.

    Modes are set as attributes: `eval()` may do more, as merging adapters into weights. Casts of autocast are not cached: torch
    has been known to give those made without gradients to the next call, whose parameters then had none.
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
