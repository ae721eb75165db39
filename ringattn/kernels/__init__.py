"""Kernels: attention on one device, with lse, over a list of pieces. `get` finds one by the name a plan carries.

    sdpa                          torch's own fused operators, chosen as torch would: what "auto" means everywhere
    reference                     plain mathematics
    cudnn, flash, efficient       one of torch's operators in particular, wherever it can be had on CUDA
    flex                          torch's flex_attention
    flash2, flash3, flash4        the flash-attn packages, which must be installed
    emulated:FLOPS                takes the time and no numbers

"auto" means sdpa and not the fastest that is installed: a plan is made without looking at any device, and which of torch's
operators computes a call falls at the call, from device, dtype and head sizes (see `choice`). `resolved` in `pick` names it.
What would be faster is measured by `ranking`, whose answer can be given to `make_plan(kernel=...)`, and printed by
`ringattn doctor --rank-kernels`.
"""

from functools import cache

from ringattn.errors import InputError
from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.emulated import Emulated
from ringattn.kernels.flash2 import Flash2
from ringattn.kernels.flash3 import Flash3
from ringattn.kernels.flash4 import Flash4
from ringattn.kernels.flex import Flex
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Cudnn, Efficient, Sdpa, TorchFlash
from ringattn.plan.kernel_names import parse

KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel for kernel in (Sdpa, Reference, Cudnn, TorchFlash, Efficient, Flex, Flash2, Flash3, Flash4)
}


@cache
def get(name: str) -> Kernel:
    """The kernel that `Plan.kernel` names: a name, one with options ("flash3:sm_margin=8"), or "emulated:" and its flop/s.

    Raises:
        InputError: no kernel has this name or takes these options; the package that brings it is absent, or has other functions
            than are known here.
    """
    if name.startswith(f"{Emulated.name}:"):
        return Emulated(float(name.partition(":")[2]))
    kernel, options = parse(name, InputError)
    return KERNELS[kernel](**options)


__all__ = ["KERNELS", "Emulated", "Operands", "Grads", "Kernel", "Options", "Rows", "get"]
