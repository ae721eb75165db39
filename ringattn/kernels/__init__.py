"""Kernels: attention on one device, with lse, over a list of pieces. `get` finds one by the name a plan carries."""

from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.emulated import Emulated
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa

KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (Reference, Sdpa)}


def get(name: str) -> Kernel:
    """The kernel that `Plan.kernel` names: a name, or "emulated:" and its flop/s."""
    name, _, flops = name.partition(":")
    return Emulated(float(flops)) if name == Emulated.name else KERNELS[name]()


__all__ = ["KERNELS", "Emulated", "Operands", "Grads", "Kernel", "Options", "Rows", "get"]
