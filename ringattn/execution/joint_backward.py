"""Makes a tensor that needs no gradient take part in a backward pass, because other ranks need theirs.

Backward of attention is collective: a rank that needs a gradient gets it from all ranks. In one process a tensor that needs
none changes nothing for the others, so it must not do so here either: ranks agree on whether any of them needs a gradient
(`comm.consistency`), and then all of them go through backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringattn.comm.consistency import Gradient


def gradient_of(*tensors: object) -> Gradient:
    """What this rank says of its part in the backward pass of a call with `tensors`; whatever is no tensor is left out."""
    if not torch.is_grad_enabled():
        return Gradient.OFF
    given = [x for x in tensors if isinstance(x, Tensor)]
    if any(x.requires_grad for x in given):
        return Gradient.NEEDED
    # A compiled graph gets no backward pass of a call that needs none, and autograd saves no inference tensors.
    apart = torch.compiler.is_compiling() or any(x.is_inference() for x in given)
    return Gradient.OFF if apart else Gradient.NONE


def in_backward(x: Tensor) -> Tensor:
    """The same numbers in the same memory; what is computed from them requires a gradient, and x itself gets none."""
    if x.requires_grad:
        return x
    taking_part: Tensor = _InBackward.apply(x, x.new_zeros((), requires_grad=True))
    return taking_part


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None
