"""Positions of the whole sequence for models that embed positions of their own, beginning at 0 on every rank.

A module that embeds positions is called for the whole sequence, and this rank's rows are taken of what it returns. So whatever
it makes positions of, as ids without their padding, it makes them as in one process. What it returns for the whole is let go at
once: (seq_len, hidden), or (batch, seq_len, hidden) where positions hang on ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ringattn.errors import InputError
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.seq2seq.batch import own_rows

MAKES_POSITIONS = ("position_ids", "past_key_values_length")  # arguments of a forward that embeds positions


def embed_positions(stack: nn.Module) -> Iterator[nn.Module]:
    """Modules beside the layers whose forward makes positions, as its arguments tell."""
    for child in stack.children():
        if isinstance(child, nn.ModuleList | GradientCheckpointingLayer):
            continue
        has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
        if not has_layers and set(MAKES_POSITIONS) & set(inspect.signature(child.forward).parameters):
            yield child
        else:
            yield from embed_positions(child)


class WholePositions:
    """Calls a module that embeds positions for the whole sequence, and takes this rank's rows of what it returns.

    What such a module is given of this rank's rows is their ids, their shape, or positions 0, 1, 2, ... Of a tensor that is
    asked for its shape the whole holds NaN, so that one whose numbers are used is found.
    """

    def __init__(self, shards: Shards, ids: Tensor | None) -> None:
        self.ids, self.rows, self.length = ids, own_rows(shards), shards.layout.length

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(self._whole(x) for x in args), {name: self._whole(x) for name, x in kwargs.items()}

    def _whole(self, x: Any) -> Any:
        count = len(self.rows)
        if isinstance(x, tuple) and len(x) > 1 and x[1] == count:  # a shape
            return type(x)((x[0], self.length, *x[2:]))
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        places = torch.arange(count, device=x.device)
        if not x.is_floating_point() and x.numel() == count and torch.equal(x.flatten(), places):
            return torch.arange(self.length, device=x.device).view([-1 if n == count else n for n in x.shape])
        if x.ndim > 1 and x.shape[1] == count:
            if x.is_floating_point():
                return x.new_full((), float("nan")).expand(x.shape[0], self.length, *x.shape[2:])
            if self.ids is not None and torch.equal(x, self.ids.to(x.device).index_select(1, self.rows.to(x.device))):
                return self.ids.to(x.device)
        raise InputError(f"positions are made of a tensor of shape {tuple(x.shape)} that holds neither ids nor places")

    def after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if isinstance(outputs, tuple):
            return tuple(self.after(module, args, x) for x in outputs)
        dim = 0 if outputs.ndim == 2 else 1
        if outputs.shape[dim] != self.length:
            name, shape = type(module).__name__, tuple(outputs.shape)
            raise InputError(f"{name} returned positions of shape {shape}, which are not those of {self.length} rows")
        own = outputs.index_select(dim, self.rows.to(outputs.device))
        if own.isnan().any():
            raise InputError(f"{type(module).__name__} makes positions of the numbers of its rows, which only their ranks have")
        return own
