"""What a run of a test's function may leave behind in a process that other runs will use, and how it is found.

`State()` before and `left_behind(before)` after: whatever of the process as a whole has changed is named, and that process is
not used again. Nothing is put back, apart from what a run cannot help changing: random numbers, caches, garbage.
"""

import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

OURS = "ringattn"
_Cache = type(lru_cache(int))
WATCHED = ("os", "time", "signal", "socket", "threading", "torch", "torch.distributed", "torch.nn.functional", "torch.cuda")
PATIENCE = 1.0  # seconds that threads get to notice that their group has gone


class Start:
    """How a rank is when it has just been started: to begin every run in that state."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._hook = sys.excepthook

    def again(self) -> None:
        """Random numbers, what is remembered of earlier calls, and garbage: as in a rank that has done nothing yet."""
        random.seed(0)
        np.random.seed(0)
        torch.set_rng_state(self._torch)
        sys.excepthook = self._hook  # each group puts one before those that were
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        for module in _modules(OURS):
            for value in list(vars(module).values()):
                if issubclass(type(value), _Cache):
                    value.cache_clear()
        gc.collect()


class State:
    """All of a process that a run may have changed for those after it."""

    def __init__(self) -> None:
        self.settings = _settings()
        self.names = dict(_names())

    def left_behind(self) -> list[str]:
        """What has changed since, in words; nothing if the process is as it was."""
        until = time.monotonic() + PATIENCE
        while _settings()["threads"] != self.settings["threads"] and time.monotonic() < until:
            time.sleep(0.01)
        now, names = _settings(), dict(_names())
        changed = [name for name, value in self.settings.items() if now[name] != value]
        return changed + [name for name, value in self.names.items() if name in names and names[name] is not value]


def _settings() -> dict[str, Any]:
    """What torch, the interpreter and the system have one of for the whole process."""
    actual = {
        "threads": sorted((item.ident, item.name) for item in threading.enumerate()),
        "children": _children(),
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "a timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "sys.excepthook": sys.excepthook,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "limits": [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "number of threads": torch.get_num_threads(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "precision of matmul": torch.get_float32_matmul_precision(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "profiler": torch.autograd._profiler_enabled(),
        "garbage collection": gc.isenabled(),
    }
    if "transformers.modeling_utils" in sys.modules:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        actual["attention interfaces"] = [sorted(item._global_mapping) for item in (AttentionInterface, AttentionMaskInterface)]
    return actual


def _children() -> list[str]:
    listed = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return listed.read_text().split() if listed.exists() else []


def _names() -> Iterator[tuple[str, Any]]:
    """What the names of modules and classes stand for, and how much the lists of test modules hold."""
    for module in _modules(OURS, *WATCHED):
        mine = module.__name__.startswith(OURS)
        for name, value in list(vars(module).items()):
            if name.startswith("__") or issubclass(type(value), ModuleType):
                continue
            yield f"{module.__name__}.{name}", value
            if mine and issubclass(type(value), type) and value.__module__ == module.__name__:
                yield from ((f"{module.__name__}.{name}.{key}", of_class) for key, of_class in list(vars(value).items()))
    for tensor in (torch.Tensor, torch.nn.Module):
        yield from ((f"{tensor.__name__}.{key}", value) for key, value in list(vars(tensor).items()))
    for module in _modules("test_"):
        for name, value in list(vars(module).items()):
            if isinstance(value, list | dict | set) and not name.startswith("__"):
                yield f"{module.__name__}.{name} (its length)", len(value)


def _modules(*prefixes: str) -> list[ModuleType]:
    """Those that are imported and have one of these names, or stand in a package or, for "test_", any folder of that name."""
    actual = []
    for name, module in list(sys.modules.items()):
        last = name.rpartition(".")[2]
        if any(
            name == p or (p == OURS and name.startswith(p + ".")) or (p == "test_" and last.startswith(p)) for p in prefixes
        ):
            actual.append(module)
    return [module for module in actual if isinstance(module, ModuleType)]
