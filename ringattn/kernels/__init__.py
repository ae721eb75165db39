"""Kernels: attention on one device, with lse, over a list of pieces. `get` finds one by the name a plan carries.

    sdpa                          torch's own fused operators, chosen by device, dtype and piece: what "auto" means everywhere
    reference                     plain mathematics
    cudnn, flex                   torch's too, on request
    flash2, flash3, flash4        the flash-attn packages, which must be installed
    emulated:FLOPS                takes the time and no numbers

"auto" means sdpa and not the fastest that is installed: a plan is made without looking at any device, it is the same on every
rank, and so are its numbers wherever it runs. Which kernel would be picked by device, dtype and head size is said by `pick`,
whose answer can be given to `make_plan(kernel=...)`, and printed by `ringattn doctor`.
"""

from functools import cache

from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.emulated import Emulated
from ringattn.kernels.flash2 import Flash2
from ringattn.kernels.flash3 import Flash3
from ringattn.kernels.flash4 import Flash4
from ringattn.kernels.flex import Flex
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Cudnn, Sdpa

KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (Sdpa, Reference, Cudnn, Flex, Flash2, Flash3, Flash4)}


@cache
def get(name: str) -> Kernel:
    """The kernel that `Plan.kernel` names: a name, or "emulated:" and its flop/s.

    Raises:
        InputError: the package that brings it is absent, or has other functions than are known here.
    """
    name, _, flops = name.partition(":")
    return Emulated(float(flops)) if name == Emulated.name else KERNELS[name]()


__all__ = ["KERNELS", "Emulated", "Operands", "Grads", "Kernel", "Options", "Rows", "get"]
