"""Lets a compiled model end its graphs where ranks speak to each other, and not be compiled anew in each call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_in_progress: list[Callable[..., Any]] = []  # losses of calls within calls, the innermost last


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, at which a compiled model ends its graph: what ranks say to each other cannot be traced."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes seconds
        return function
    if not hasattr(function, "outside_graphs"):
        function.outside_graphs = torch.compiler.disable(function)  # type: ignore[attr-defined]
    outside: Callable[..., Any] = function.outside_graphs  # type: ignore[attr-defined]
    return outside


def _loss_in_progress(*args: Any, **kwargs: Any) -> Any:
    """One function for all calls: a compiled model is compiled anew for another."""
    return _in_progress[-1](*args, **kwargs)


@contextmanager
def loss_function(model: Any, loss: Callable[..., Any]) -> Iterator[None]:
    """Within it `loss` is the model's loss function."""
    before = model.loss_function
    model.loss_function = outside_graphs(_loss_in_progress)
    _in_progress.append(loss)
    try:
        yield
    finally:
        _in_progress.pop()
        model.loss_function = before
