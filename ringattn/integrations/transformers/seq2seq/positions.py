"""Provides positions of the whole sequence to models that embed their own positions, which would start at 0 on every rank.

A module that embeds positions is called for the whole sequence, and this rank's rows are taken from its output. It therefore
computes positions as in one process, also from ids without their padding. Its output for the whole sequence is freed at once:
(seq_len, hidden), or (batch, seq_len, hidden) where positions depend on ids.
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
    """Finds modules outside the layers whose forward makes positions, by its arguments."""
    for child in stack.children():
        if isinstance(child, nn.ModuleList | GradientCheckpointingLayer):
            continue
        has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
        if not has_layers and set(MAKES_POSITIONS) & set(inspect.signature(child.forward).parameters):
            yield child
        else:
            yield from embed_positions(child)


class WholePositions:
    """Calls a module that embeds positions for the whole sequence, and takes this rank's rows of its output.

    The inputs of such a module are ids, a shape, or positions 0, 1, 2, ... A floating-point tensor that serves for its shape is
    replaced by NaN, so that any use of its values is detected.
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
        raise InputError(f"positions are made from a tensor of shape {tuple(x.shape)} that holds neither ids nor places")

    def after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if isinstance(outputs, tuple):
            return tuple(self.after(module, args, x) for x in outputs)
        dim = 0 if outputs.ndim == 2 else 1
        if outputs.shape[dim] != self.length:
            name, shape = type(module).__name__, tuple(outputs.shape)
            raise InputError(f"{name} returned positions of shape {shape}, which are not those of {self.length} rows")
        own = outputs.index_select(dim, self.rows.to(outputs.device))
        if own.isnan().any():
            raise InputError(
                f"{type(module).__name__} makes positions from the values of its rows, which only their ranks have"
            )
        return own
