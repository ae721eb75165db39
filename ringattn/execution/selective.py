"""Detects selective activation checkpointing, so that attention reaches its policy as one operator.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` asks a policy about every operator that runs within a region, and
returns saved results instead of running the operator again. Within attention these operators write into buffers that are
reused, and send to other ranks: saved one by one, they raise torch's error about mutation, and transfers would not be repeated.
As one operator, `torch.ops.ringattn.attention.default`, attention is either saved and not sent again, or run again completely.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def under_selective_checkpointing() -> bool:
    """Whether operators run under a policy of selective checkpointing now."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def outside_dispatch_modes() -> AbstractContextManager[Any]:
    """Context in which operators run outside of dispatch modes: messages of the agreement must never be saved."""
    from torch.utils._python_dispatch import _disable_current_modes

    outside: AbstractContextManager[Any] = _disable_current_modes()
    return outside
