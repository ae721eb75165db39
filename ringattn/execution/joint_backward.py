"""Makes a tensor that needs no gradient take part in backward, because other ranks need gradients.

Backward of attention is collective: a rank that needs a gradient gets it from all ranks. In one process a tensor that needs no
gradient changes nothing for other tensors, so it must not do so across ranks: ranks agree on whether any of them needs a
gradient (`comm.consistency`), and then all of them run backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringattn.comm.consistency import Gradient


def gradient_of(*tensors: object) -> Gradient:
    """Whether this rank takes part in the backward pass of a call with `tensors`; other objects are ignored."""
    if not torch.is_grad_enabled():
        return Gradient.OFF
    present = [x for x in tensors if isinstance(x, Tensor)]
    if any(x.requires_grad for x in present):
        return Gradient.NEEDED
    # A compiled graph has no backward pass for a call that needs none, and autograd saves no inference tensors.
    excluded = torch.compiler.is_compiling() or any(x.is_inference() for x in present)
    return Gradient.OFF if excluded else Gradient.NONE


def in_backward(x: Tensor) -> Tensor:
    """A view of `x` whose results require a gradient; x itself gets none."""
    if x.requires_grad:
        return x
    view: Tensor = _InBackward.apply(x, x.new_zeros((), requires_grad=True))
    return view


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None
