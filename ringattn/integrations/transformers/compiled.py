"""Ends the graphs of a compiled model where ranks communicate, and avoids recompilation in each call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_in_progress: list[Callable[..., Any]] = []  # loss functions of nested calls, the innermost last


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with a graph break around it: communication cannot be traced."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; the import takes seconds
        return function
    if not hasattr(function, "outside_graphs"):
        function.outside_graphs = torch.compiler.disable(function)  # type: ignore[attr-defined]
    outside: Callable[..., Any] = function.outside_graphs  # type: ignore[attr-defined]
    return outside


def _loss_in_progress(*args: Any, **kwargs: Any) -> Any:
    """Calls the current loss. One function for all calls, since a new one would trigger recompilation."""
    return _in_progress[-1](*args, **kwargs)


@contextmanager
def loss_function(model: Any, loss: Callable[..., Any]) -> Iterator[None]:
    """Replaces the model's loss function by `loss` within the context."""
    before = model.loss_function
    model.loss_function = outside_graphs(_loss_in_progress)
    _in_progress.append(loss)
    try:
        yield
    finally:
        _in_progress.pop()
        model.loss_function = before
