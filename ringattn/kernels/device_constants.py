"""Caches small device tensors that all calls of the same sizes need, so that no call copies them from the host."""

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


def cached_per_stream(size: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator that caches the last `size` results of a function of hashable arguments, the last of which is a device.

    The streams of a device have separate entries (one stream may not see yet what another has written), and so have fake
    tensors of each mode. While a CUDA graph is captured, cached results are used but none is added: memory of a capture is
    uninitialized until the graph is replayed. Callers must not change the results.
    """

    def decorate(build: Callable[P, T]) -> Callable[P, T]:
        results: OrderedDict[Hashable, T] = OrderedDict()
        lock = Lock()

        @wraps(build)
        def get(*arguments: P.args, **options: P.kwargs) -> T:
            device: Any = arguments[-1]
            key = (*arguments, _stream_or_mode(device))
            with lock:
                if key in results:
                    results.move_to_end(key)
                    return results[key]
            with torch.inference_mode(False):
                result = build(*arguments, **options)
            if not _capturing(device):
                with lock:
                    results[key] = result
                    while len(results) > size:
                        results.popitem(last=False)
            return result

        return get

    return decorate


def _stream_or_mode(device: torch.device) -> Hashable:
    # Without any dispatch mode there is no fake one; looking for it takes ten times as long.
    fake = detect_fake_mode() if torch._C._len_torch_dispatch_stack() else None
    if fake is not None or device.type != "cuda":
        return fake
    return torch.cuda.current_stream(device).cuda_stream


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
