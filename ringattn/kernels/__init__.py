"""Kernels: attention on one device, with lse, over a list of pieces. `get` finds one by the name a plan carries."""

from ringattn.kernels.base import Grads, Kernel, Operands, Options, Rows
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa

KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (Reference, Sdpa)}


def get(name: str) -> Kernel:
    """The kernel that `Plan.kernel` names."""
    return KERNELS[name]()


__all__ = ["KERNELS", "Operands", "Grads", "Kernel", "Options", "Rows", "get"]
