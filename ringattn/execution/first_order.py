"""Raises an error where attention over shards is differentiated twice, in forward mode, or under torch.func.

Without this, autograd would treat the gradients of attention as constants when only the saved tensors depend on its inputs,
which makes second derivatives zero. Here gradients depend on the inputs, and differentiating them raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringattn.errors import InputError

HINT = (
    "compute the term that needs it with torch.nn.functional.scaled_dot_product_attention on the whole sequence (see unshard), "
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)
TWICE = (
    "a second derivative of attention (create_graph=True, gradient penalties, torch.autograd.functional.hessian): attention "
    f"over shards can be differentiated once; {HINT}, or detach the gradient if it is meant to be a constant"
)


def unsupported_transform(*tensors: object) -> str | None:
    """The error message if `tensors` are differentiated by other means than `backward`, else None."""
    if torch._C._are_functorch_transforms_active():
        return (
            "attention was called under torch.func (grad, vjp, jvp, vmap, jacrev, ...), which cannot carry out transfers "
            f"between ranks; use loss.backward() or torch.autograd.grad on plain tensors, or {HINT}"
        )
    if forward_ad._current_level >= 0:
        for x in tensors:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                return f"attention was called with a dual tensor of forward-mode differentiation, which is unsupported; {HINT}"
    return None


def unsupported_gradient(*grads: Tensor) -> str | None:
    """The error message if `grads` are several gradients at once, else None."""
    if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        return (
            "backward of attention was called with several gradients at once (is_grads_batched=True, vectorize=True), which it "
            "cannot send; take them one after another, with is_grads_batched=False or vectorize=False"
        )
    return unsupported_transform(*grads)


def outside_transforms() -> AbstractContextManager[Any]:
    """Context without torch.func transforms, in which new tensors are plain ones that can be sent."""
    if not torch._C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    cleared: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return cleared


def differentiable_once(grads: Sequence[Tensor | None], *sources: Tensor) -> list[Tensor | None]:
    """`grads` with a dependence on all `sources` that require a gradient; differentiating them raises `InputError`.

    Where torch records no graph, as in backward without create_graph, they are returned unchanged.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    marked = iter(_DifferentiableOnce.apply(len(sources), *sources, *(grad for grad in grads if grad is not None)))
    return [None if grad is None else next(marked) for grad in grads]


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise InputError(TWICE)
