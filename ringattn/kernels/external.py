"""Kernels that other packages bring: imported when one is first asked for, and checked before anything is called.

A package that is absent, or whose functions do not take what the adapter passes, is an `InputError` that names the cure; it is
raised (by `ringattn.kernels.obstacle`) while all ranks still agree on the call, not in the middle of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any, NamedTuple

from ringattn.errors import InputError


class Package(NamedTuple):
    """Where a kernel's functions are, how to get them, and the keywords with which each is called."""

    name: str
    module: str
    install: str
    calls: tuple[Mapping[str, tuple[str, ...]], ...]  # by function; several where versions differ

    def load(self) -> tuple[ModuleType, Mapping[str, tuple[str, ...]]]:
        """The module, and which of `calls` its functions take."""
        try:
            module = import_module(self.module)
        except Exception as error:  # a package built for another torch or CUDA fails to load in many ways
            why = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
            raise InputError(f"{self.name} {why} ({error}); {self.install}") from error
        for calls in self.calls:
            if all(_takes(getattr(module, function, None), keywords) for function, keywords in calls.items()):
                return module, calls
        raise InputError(f"{self.name} has other functions than the versions known here ({self._wanted()}); {self.install}")

    def _wanted(self) -> str:
        return f"{', '.join(self.calls[-1])} in {self.module}"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Its parameters by name; a `torch.library.custom_op` is known by the function it was made from."""
    return tuple(signature(getattr(function, "_init_fn", function)).parameters)


def _takes(function: Callable[..., Any] | None, keywords: tuple[str, ...]) -> bool:
    return function is not None and set(keywords) <= set(parameters(function))
