"""Computes attention on one device, with lse, over a list of segments. `get` finds a kernel by the name a plan carries.

The names and their summaries are in `ringattn.plan.kernel_names.KERNELS`; the classes here define what they cannot compute
(`Kernel.unsupported_reason`), and `register` adds one.

"auto" means sdpa and not the fastest kernel that is installed: a plan is made without looking at any device, and which of
torch's operators computes a call is chosen in the call, from device, dtype and head sizes (see `operator_choice`; `resolved` in
`select` names it). `ranking` measures which kernel is faster; its result can be given to `make_plan(kernel=...)`, and
`ringattn doctor --rank-kernels` prints it.
"""

from functools import cache
from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING, Any, TypeVar

from ringattn._validation import short_repr
from ringattn.errors import InputError
from ringattn.kernels.base import Grads, Kernel, KernelCall, Operands, Options, Rows
from ringattn.kernels.emulated import Emulated
from ringattn.kernels.flash2 import Flash2
from ringattn.kernels.flash3 import Flash3
from ringattn.kernels.flash4 import Flash4
from ringattn.kernels.flex import Flex
from ringattn.kernels.lse import Partial, accum_dtype, merge_
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Cudnn, Efficient, Sdpa, TorchFlash
from ringattn.plan.kernel_names import KERNELS as NAMES
from ringattn.plan.kernel_names import KernelInfo, KernelOption, parse

KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel for kernel in (Sdpa, Reference, Cudnn, TorchFlash, Efficient, Flex, Flash2, Flash3, Flash4)
}
K = TypeVar("K", bound=type[Kernel])


def register(kernel: K) -> K:
    """Register a kernel for `make_plan(kernel=...)` under its `name`; also a decorator. Call it on every rank.

    Ranks compare where the class is defined, so that two different kernels of one name raise `MismatchError` at the first call.

    Raises:
        InputError: `kernel` is not a concrete subclass of `Kernel`, or its name is taken.
    """
    if not isinstance(kernel, type) or not issubclass(kernel, Kernel) or isabstract(kernel):
        methods = " and ".join(sorted(getattr(kernel, "__abstractmethods__", ()) or Kernel.__abstractmethods__))
        raise InputError(f"register({short_repr(kernel)}): give a subclass of Kernel with {methods}")
    name = getattr(kernel, "name", None)
    summary = (kernel.__doc__ or "").strip().partition("\n")[0]
    NAMES.register(name, KernelInfo(summary, kernel.options))  # type: ignore[arg-type]  # it raises for an invalid name
    KERNELS[kernel.name] = kernel
    get.cache_clear()
    return kernel


def unregister(name: str) -> None:
    """Remove a registered kernel. Raises `InputError` if there is none of this name."""
    NAMES.unregister(name)
    del KERNELS[name]
    get.cache_clear()


def class_of(name: str) -> type[Kernel]:
    """The class of the kernel that `Plan.kernel` names. Raises `InputError` as `get` does."""
    return Emulated if name.startswith(f"{Emulated.name}:") else KERNELS[parse(name, InputError).kernel]


@cache
def get(name: str) -> Kernel:
    """The kernel that `Plan.kernel` names: a name, one with options ("flash3:sm_margin=8"), or "emulated:" and its flop/s.

    Raises:
        InputError: no kernel has this name or takes these options; the package that provides it is missing, or has other
            functions than this version supports.
    """
    kernel = class_of(name)
    return Emulated(float(name.partition(":")[2])) if kernel is Emulated else kernel(**parse(name, InputError).options)


_LATER = {"unsupported_reason": "select"}  # which takes kernels from here


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"ringattn.kernels.{_LATER[name]}"), name)
    raise AttributeError(f"module 'ringattn.kernels' has no attribute {name!r}")


__all__ = [
    "KERNELS",
    "Emulated",
    "Grads",
    "Kernel",
    "KernelCall",
    "KernelOption",
    "Operands",
    "Options",
    "Partial",
    "Reference",
    "Rows",
    "accum_dtype",
    "get",
    "merge_",
    "register",
    "unregister",
    "unsupported_reason",
]

if TYPE_CHECKING:
    from ringattn.kernels.select import unsupported_reason as unsupported_reason
