"""Imports kernels from other packages when one is first needed, and checks their functions before a call.

A package that is missing, or whose functions do not take the adapter's keywords, is an `InputError` with a hint; it is raised
(by `kernels.select.unsupported_reason`) while all ranks still agree on the call, not in the middle of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any, NamedTuple

from ringattn.errors import InputError


class Package(NamedTuple):
    """The module with a kernel's functions, how to install it, and the keywords with which each function is called."""

    name: str
    module: str
    install: str
    calls: tuple[Mapping[str, tuple[str, ...]], ...]  # by function; several where versions differ

    def load(self) -> tuple[ModuleType, Mapping[str, tuple[str, ...]]]:
        """The module, and the entry of `calls` that its functions accept."""
        try:
            module = import_module(self.module)
        except Exception as error:  # a package built for another torch or CUDA fails to load in many ways
            why = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
            raise InputError(f"{self.name} {why} ({error}); {self.install}") from error
        for calls in self.calls:
            if all(_accepts(getattr(module, function, None), keywords) for function, keywords in calls.items()):
                return module, calls
        raise InputError(f"{self.name} has other functions than the versions known here ({self._expected()}); {self.install}")

    def _expected(self) -> str:
        return f"{', '.join(self.calls[-1])} in {self.module}"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of its parameters; for a `torch.library.custom_op`, those of the wrapped function."""
    return tuple(signature(getattr(function, "_init_fn", function)).parameters)


def _accepts(function: Callable[..., Any] | None, keywords: tuple[str, ...]) -> bool:
    return function is not None and set(keywords) <= set(parameters(function))
