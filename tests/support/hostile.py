"""What callers pass by mistake, and worse; and the only two answers a public function may have to it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ringattn import RingAttnError
from ringattn.sequence.mask import Mask


class Spiteful:
    """Everything that Python asks an object by itself raises."""

    def refuse(self, *_: object) -> Any:
        raise ArithmeticError("no")

    __repr__ = __str__ = __eq__ = __lt__ = __bool__ = __len__ = __iter__ = __index__ = __float__ = __getitem__ = refuse
    __hash__ = object.__hash__


def endless() -> Iterator[int]:
    raise ArithmeticError("no end")
    yield


VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "0": 0,
    "-1": -1,
    "1": 1,
    "1e9": 10**9,
    "2**63": 2**63,
    "-2**63": -(2**63),
    "10**5000": 10**5000,
    "0.0": 0.0,
    "-0.5": -0.5,
    "1.5": 1.5,
    "1e308": 1e308,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "complex": 1j,
    "empty text": "",
    "text": "no such thing",
    "lines": "a\nb=c",
    "not ascii": "größe\ud800",
    "zero byte": "a\0b",
    "long text": "x" * 10**5,
    "bytes": b"\xff",
    "list": [],
    "nested": [1, [2, [3, None]]],
    "long list": [0] * 10**5,
    "tuple": (),
    "pair": (1, 2),
    "texts": ("a", "b"),
    "dict": {"a": 1},
    "set": {1},
    "object": object(),
    "class": Mask,
    "function": len,
    "spiteful": Spiteful(),
    "path": Path("/no/such/place"),
    "dtype": torch.float16,
    "number tensor": torch.tensor(2),
    "0-dim tensor": torch.zeros(()),
    "empty tensor": torch.zeros(2, 0, 3),
    "nan tensor": torch.full((2, 13, 4, 8), float("nan")),
    "int tensor": torch.zeros(2, 13, dtype=torch.int64),
    "bool tensor": torch.ones(2, 13, dtype=torch.bool),
    "complex tensor": torch.zeros(2, 13, dtype=torch.complex64),
    "meta tensor": torch.zeros(2, 13, 4, 8, device="meta"),
    "sparse tensor": torch.zeros(2, 13, 4, 8).to_sparse(),
    "numpy int": np.int64(2),
    "numpy float": np.float32(1.5),
    "numpy array": np.zeros((2, 3)),
    "numpy text": np.array(["auto", "ring"]),
}

SIGNATURE = re.compile(r"unexpected keyword argument|missing \d+ required|positional arguments?( but|:)|got multiple values")


def survives(call: Callable[[], Any], *, naming: str = "") -> str | None:
    """What the error that ringattn raises says, or None where it raises none. Any other end is a failure."""
    try:
        call()
    except RingAttnError as error:
        message = str(error)
        message.encode()  # it can be printed
        assert len(message) < 2000 and naming in message, message
        return message
    except TypeError as error:
        assert SIGNATURE.search(str(error)), error
    return None


def each_alone(name: str, call: Callable[..., Any], fine: dict[str, Any]) -> None:
    """Every value for every argument, the others being fine. What is said names the argument, or what the function is of."""
    assert survives(lambda: call(**fine)) is None
    for argument in fine:
        for label, value in VALUES.items():
            message = survives(lambda given={argument: value}: call(**{**fine, **given}))
            words = {argument, *re.findall(r"[A-Za-z_]+", name.lower()), *fine, "schedule", "layout", "topology", "tiles"}
            assert message is None or any(word in message.lower() for word in words), f"{argument}: {label}: {message}"


def several(functions: dict[str, tuple[Callable[..., Any], dict[str, Any]]]) -> list[str]:
    """Those with more than one argument."""
    return [name for name, (_, fine) in functions.items() if len(fine) > 1]


def two_at_once(data: st.DataObject, call: Callable[..., Any], fine: dict[str, Any]) -> None:
    """Two arguments, drawn, with a drawn value each."""
    names = data.draw(st.permutations(sorted(fine)))[:2]
    chosen = {name: VALUES[data.draw(st.sampled_from(sorted(VALUES)))] for name in names}
    survives(lambda: call(**{**fine, **chosen}))
