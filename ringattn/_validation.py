"""Whether a value is what an argument takes: the checks that all public functions share, each said once.

A checker returns the value in the form to work with, or raises the error class it is given. Its text names the argument, what
was found, and what may stand there. What a caller passes may be anything, so its `repr` may be endless, or raise: `short_repr`
alone turns a value into words. No torch here.
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
    """`repr(value)`, short, on one line, and without fail."""
    try:
        words = WORDS.repr(value)
    except Exception:  # of whatever class: it is the caller's
        words = f"a {type(value).__name__} that cannot be shown"
    return " ".join(words.encode(errors="backslashreplace").decode().split())


def error_message(check: Callable[[], object]) -> str | None:
    """What `check` raises, in words, or None: for whoever has to tell other ranks before it raises."""
    try:
        check()
    except RingAttnError as error:
        return str(error)
    return None


def as_int(name: str, value: Any, error: type[RingAttnError], must: str = "a whole number") -> int:
    """A whole number of any size and sign, numpy's and torch's included."""
    try:
        return int(index(value))  # also of a bool, which torch does not take for a number
    except Exception:  # tensors raise more than TypeError
        raise error(f"{name}={short_repr(value)}; must be {must}") from None


def count(name: str, value: Any, error: type[RingAttnError], *, least: int = 1, most: int = MOST, hint: str = "") -> int:
    """A whole number from `least` to `most`; `hint` is said of one that is too small."""
    number = as_int(name, value, error)
    if number < least:
        raise error(f"{name}={short_repr(number)}; must be {least} or more{hint and '; '}{hint}")
    if number > most:
        raise error(f"{name}={short_repr(number)}; must be {most:,} or less")
    return number


def counts(name: str, value: Any, error: type[RingAttnError]) -> tuple[int, ...]:
    """Several whole numbers, as a list, a tuple, an array or a tensor of one dimension."""
    try:
        return tuple(index(one) for one in value.tolist()) if hasattr(value, "tolist") else tuple(map(index, value))
    except Exception:
        raise error(f"{name}={short_repr(value)}; must be a sequence of whole numbers") from None


def as_finite_float(value: object) -> float | None:
    """The finite number that `value` is, or None."""
    try:
        return float(value) if isinstance(value, Real) and isfinite(value) else None
    except Exception:  # too large for a float, or a number of the caller's own making
        return None


def number(
    name: str, value: Any, error: type[RingAttnError], *, above: float | None = None, least: float | None = None
) -> float:
    """A finite number more than `above`, or of `least` or more."""
    found = as_finite_float(value)
    if found is None or (above is not None and found <= above) or (least is not None and found < least):
        bound = "" if above is None else f" more than {above:g}"
        bound += "" if least is None else f" of {least:g} or more"
        raise error(f"{name}={short_repr(value)}; must be a finite number{bound}")
    return found


def seconds(name: str, value: Any, error: type[RingAttnError]) -> float:
    """A time to wait at most, more than none and up to a month: longer ones overflow where they are passed on."""
    found = number(name, value, error, above=0.0)
    if found > MONTH:
        raise error(f"{name}={short_repr(value)}; give seconds, up to {MONTH:,.0f}")
    return found


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
    """Of a file or a directory."""
    try:
        found = Path(value)
    except Exception:
        found = Path("\0")
    try:
        os.fsencode(found)
        unusable = "\0" in os.fspath(found) or len(os.fspath(found)) > LONGEST_PATH
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise error(f"{name}={short_repr(value)}; must be a path, as text or a pathlib.Path")
    return found


class Registry(dict[str, T]):
    """Everything of one kind that can be chosen by name: what the library brings, and what a program adds.

    Lists of choices, flags, error messages and pages are made from it. `changes` counts additions and removals, for caches of
    what depends on the names.
    """

    def __init__(self, kind: str, built_in: Mapping[str, T], *, reserved: Iterable[str] = ()) -> None:
        super().__init__(built_in)
        self.kind, self.built_in, self.reserved = kind, frozenset(built_in), frozenset(reserved)
        self.changes = 0

    def register(self, name: str, entry: T) -> None:
        """Add `entry`. Raises `InputError` if there is one of this name, or if the name cannot be one."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise InputError(f"name of a {self.kind}: {short_repr(name)}; give letters, digits, _ and -, a letter first")
        if name in self.built_in or name in self.reserved:
            raise InputError(f"{self.kind} {name!r} belongs to the library; register yours under another name")
        if name in self:
            raise InputError(f"{self.kind} {name!r} is registered already; choose another name, or unregister({name!r}) first")
        self[name] = entry
        self.changes += 1

    def unregister(self, name: str) -> None:
        """Remove what `register` has added. Raises `InputError` if there is none of this name."""
        added = [one for one in self if one not in self.built_in]
        if not isinstance(name, str) or name not in added:
            raise InputError(f"unregister({short_repr(name)}): registered {self.kind} names are: {', '.join(added) or 'none'}")
        del self[name]
        self.changes += 1


def definition_of(registered: Any) -> str:
    """Where a registered class or function is defined: ranks compare it, as equal names may stand for different code."""
    return f"{registered.__module__}.{registered.__qualname__}"
