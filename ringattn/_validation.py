"""Checks argument values for all public functions; each check exists once.

A checker returns the value in the form the library works with, or raises the error class it is given. The message names the
argument, what was found, and what is allowed. A caller may pass anything, and the `repr` of a value may be endless or raise, so
only `short_repr` turns values into text. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from numbers import Real
from operator import index
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from ringattn.errors import InputError, RingAttnError

T = TypeVar("T")

MOST = 1 << 48  # no count is larger: products of a few of them are still finite as floats, and sums of them fit 64 bits
LONGEST_PATH = 4096
MONTH = 30 * 86400.0  # in seconds
WORDS = Repr()
WORDS.maxstring = WORDS.maxother = WORDS.maxlong = 200


def short_repr(value: object) -> str:
    """`repr(value)`, shortened to one line; never raises."""
    try:
        words = WORDS.repr(value)
    except Exception:  # of any class: the caller's own code runs here
        words = f"a {type(value).__name__} that cannot be shown"
    return " ".join(words.encode(errors="backslashreplace").decode().split())


def error_message(check: Callable[[], object]) -> str | None:
    """The message of the error that `check` raises, or None; for calls that send it to other ranks before raising."""
    try:
        check()
    except RingAttnError as error:
        return str(error)
    return None


def as_int(name: str, value: Any, error: type[RingAttnError], must: str = "a whole number") -> int:
    """An integer of any size and sign, including those of numpy and torch."""
    try:
        return int(index(value))  # also for a bool, which torch does not accept as a number
    except Exception:  # tensors raise more than TypeError
        raise error(f"{name}={short_repr(value)}; must be {must}") from None


def count(name: str, value: Any, error: type[RingAttnError], *, least: int = 1, most: int = MOST, hint: str = "") -> int:
    """A whole number from `least` to `most`; `hint` is added to the message when it is too small."""
    number = as_int(name, value, error)
    if number < least:
        raise error(f"{name}={short_repr(number)}; must be {least} or more{hint and '; '}{hint}")
    if number > most:
        raise error(f"{name}={short_repr(number)}; must be {most:,} or less")
    return number


def counts(name: str, value: Any, error: type[RingAttnError]) -> tuple[int, ...]:
    """A sequence of integers: a list, a tuple, or a 1-D array or tensor."""
    try:
        return tuple(index(element) for element in value.tolist()) if hasattr(value, "tolist") else tuple(map(index, value))
    except Exception:
        raise error(f"{name}={short_repr(value)}; must be a sequence of whole numbers") from None


def as_finite_float(value: object) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    try:
        return float(value) if isinstance(value, Real) and isfinite(value) else None
    except Exception:  # too large for a float, or a number class of the caller
        return None


def number(
    name: str, value: Any, error: type[RingAttnError], *, above: float | None = None, least: float | None = None
) -> float:
    """A finite number more than `above`, or of `least` or more."""
    result = as_finite_float(value)
    if result is None or (above is not None and result <= above) or (least is not None and result < least):
        bound = "" if above is None else f" more than {above:g}"
        bound += "" if least is None else f" of {least:g} or more"
        raise error(f"{name}={short_repr(value)}; must be a finite number{bound}")
    return result


def seconds(name: str, value: Any, error: type[RingAttnError]) -> float:
    """A timeout in seconds, more than 0 and up to a month: longer ones overflow in the calls that receive them."""
    result = number(name, value, error, above=0.0)
    if result > MONTH:
        raise error(f"{name}={short_repr(value)}; give seconds, up to {MONTH:,.0f}")
    return result


def flag(name: str, value: Any, error: type[RingAttnError]) -> bool:
    if not isinstance(value, bool):
        raise error(f"{name}={short_repr(value)}; must be True or False")
    return value


def one_of(name: str, value: Any, choices: Iterable[str], error: type[RingAttnError]) -> str:
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name}={short_repr(value)}; choose one of {', '.join(choices)}")
    return value


def text(name: str, value: Any, error: type[RingAttnError]) -> str:
    if not isinstance(value, str):
        raise error(f"{name}={short_repr(value)}; must be a text")
    return value


def instance(name: str, value: Any, kind: type[T] | tuple[type[T], ...], error: type[RingAttnError], hint: str) -> T:
    if not isinstance(value, kind):
        raise error(f"{name}={short_repr(value)}; {hint}")
    return value


def path(name: str, value: Any, error: type[RingAttnError]) -> Path:
    """The path of a file or a directory."""
    try:
        result = Path(value)
    except Exception:
        result = Path("\0")
    try:
        os.fsencode(result)
        unusable = "\0" in os.fspath(result) or len(os.fspath(result)) > LONGEST_PATH
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise error(f"{name}={short_repr(value)}; must be a path, as text or a pathlib.Path")
    return result


class Registry(dict[str, T]):
    """Entries of one kind that are chosen by name: those of the library, and those that a program registers.

    Lists of choices, flags, error messages and pages are built from it. `changes` counts additions and removals, for caches
    that depend on the names.
    """

    def __init__(self, kind: str, built_in: Mapping[str, T], *, reserved: Iterable[str] = ()) -> None:
        super().__init__(built_in)
        self.kind, self.built_in, self.reserved = kind, frozenset(built_in), frozenset(reserved)
        self.changes = 0

    def register(self, name: str, entry: T) -> None:
        """Adds `entry`. Raises `InputError` if the name exists already or is not valid."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise InputError(f"name of a {self.kind}: {short_repr(name)}; give letters, digits, _ and -, a letter first")
        if name in self.built_in or name in self.reserved:
            raise InputError(f"{self.kind} {name!r} belongs to the library; register yours under another name")
        if name in self:
            raise InputError(f"{self.kind} {name!r} is registered already; choose another name, or unregister({name!r}) first")
        self[name] = entry
        self.changes += 1

    def unregister(self, name: str) -> None:
        """Removes an entry that `register` added. Raises `InputError` if there is none of this name."""
        added = [other for other in self if other not in self.built_in]
        if not isinstance(name, str) or name not in added:
            raise InputError(f"unregister({short_repr(name)}): registered {self.kind} names are: {', '.join(added) or 'none'}")
        del self[name]
        self.changes += 1


def definition_of(registered: Any) -> str:
    """Where a registered class or function is defined: ranks compare it, as equal names may stand for different code."""
    named = registered if hasattr(registered, "__qualname__") else type(registered)
    return f"{named.__module__}.{named.__qualname__}"
