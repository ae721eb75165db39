"""Tells whether selective activation checkpointing is watching, so that attention comes to its policy as one operator.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` asks a policy about every operator that runs within a region, and
hands out what was saved instead of running it again. Within attention these operators write into buffers that are used again,
and send to other ranks: saved one by one, they raise torch's error about mutation, and transfers would not be repeated. As one
operator, `torch.ops.ringattn.attention.default`, attention is saved whole, and is then not sent again, or is run again whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def watched() -> bool:
    """Whether a policy of selective checkpointing is asked about the operators that run now."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def unwatched() -> AbstractContextManager[Any]:
    """Within it operators run and no dispatch mode hears of them: what ranks say to each other is never to be saved."""
    from torch.utils._python_dispatch import _disable_current_modes

    outside: AbstractContextManager[Any] = _disable_current_modes()
    return outside
