"""Keeps small tensors that every call of the same sizes needs again, so that no call copies from the host or waits for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

P = ParamSpec("P")
T = TypeVar("T")


def kept(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator for a function of hashable arguments, the last of which is a device: its last `most` results are kept.

    Kept apart are the streams of a device (what one stream has written another may not have seen yet) and fake tensors of each
    mode. While a CUDA graph is captured what is there is used, but nothing is added: memory of a capture holds nothing until
    the graph is replayed. Results must not be changed by whoever gets them.
    """

    def decorate(build: Callable[P, T]) -> Callable[P, T]:
        results: OrderedDict[Hashable, T] = OrderedDict()
        lock = Lock()

        @wraps(build)
        def get(*arguments: P.args, **options: P.kwargs) -> T:
            device: Any = arguments[-1]
            key = (*arguments, _where(device))
            with lock:
                if key in results:
                    results.move_to_end(key)
                    return results[key]
            with torch.inference_mode(False):
                made = build(*arguments, **options)
            if not _capturing(device):
                with lock:
                    results[key] = made
                    while len(results) > most:
                        results.popitem(last=False)
            return made

        return get

    return decorate


def _where(device: torch.device) -> Hashable:
    # Without any mode there is no fake one; looking for it takes ten times as long.
    fake = detect_fake_mode() if torch._C._len_torch_dispatch_stack() else None
    if fake is not None or device.type != "cuda":
        return fake
    return torch.cuda.current_stream(device).cuda_stream


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
