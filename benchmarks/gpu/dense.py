"""Dense attention of a whole sequence by torch, pinned to one of its kernels: what ringattn is measured against."""

from __future__ import annotations

import torch
from common import Example
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

PINS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def backends(device: torch.device) -> tuple[str, ...]:
    """Names for `Dense`; "torch" leaves the choice to torch."""
    return ("torch", *PINS) if device.type == "cuda" else ("torch", "flash")


def flops(length: int, heads: int, dim: int, *, causal: bool) -> float:
    """Of one forward pass: two products of 2 x pairs x dim for each head. Backward has five, so 2.5 times as many."""
    return 4 * heads * dim * (length * (length + 1) / 2 if causal else length**2)


def random_inputs(length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Example:
    """Normal random numbers made on the device, (1, length, heads, dim): as they lie where a projection has just made them."""
    source = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn(1, length, heads, dim, generator=source, device=device, dtype=dtype) for _ in range(4))
    return Example(q, k, v, dout)


class Dense:
    """Forward and backward of one example, as often as wanted."""

    def __init__(self, name: str, e: Example, *, causal: bool) -> None:
        self.pin, self.causal = PINS.get(name), causal
        self.leaves = [x.detach().requires_grad_() for x in e[:3]]
        self.dout = e.dout.transpose(1, 2)
        self.out: Tensor | None = None

    def forward(self) -> None:
        q, k, v = (x.transpose(1, 2) for x in self.leaves)
        if self.pin is None:
            self.out = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return
        with sdpa_kernel([self.pin]):
            self.out = scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def backward(self) -> None:
        assert self.out is not None
        torch.autograd.grad(self.out, self.leaves, self.dout)
        self.out = None
