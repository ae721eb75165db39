"""A learned gate that deletes rows, and the controller that keeps it at a rate: MrT5.

Each row gives itself a number g in (-10, 0]. In training it is added to the row's key logits, so that a row fades and nothing
is removed; afterwards rows below -5 are removed. The gate of a row looks at nothing but the row, so it is causal wherever the
row is. How much is deleted follows a target: a PI controller turns the error of the rate over all ranks into the weight of
mean(g) in the loss. Kallini et al. 2024, https://arxiv.org/abs/2410.20771; what differs here: rows that are deleted pass the
layers by instead of ending, since a decoder has to predict at every row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ringattn._validation import count, number
from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor
from ringattn.merging.exchange import tell_as
from ringattn.merging.merge import DELETED, Merge
from ringattn.sequence.layout import Layout

MOST_CHANNELS = 1 << 24


class DeleteGate(nn.Module):
    """g = -scale * sigmoid(-(w . rms_norm(x) + b)) for each row: 0 keeps it, -scale deletes it."""

    def __init__(self, dim: int, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = number("scale", scale, InputError, above=0)
        self.weight = nn.Parameter(torch.zeros(count("dim", dim, InputError, most=MOST_CHANNELS)))
        self.bias = nn.Parameter(torch.ones(()))  # at first almost all is kept

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, rows, dim). Returns (batch, rows) in fp32, fp64 for fp64.

        Each row by itself, in a sum whose order does not hang on how many rows there are: it decides the same on any number of
        ranks.
        """
        if as_strided_tensor("x", x).ndim != 3 or x.shape[-1] != len(self.weight) or not x.is_floating_point():
            raise InputError(f"x: {x.dtype} of shape {tuple(x.shape)}; give floating-point (batch, rows, {len(self.weight)})")
        with torch.autocast(x.device.type, enabled=False):
            wide = x.double()
            wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            z = (wide * self.weight.double()).sum(-1) + self.bias.double()
            return (-self.scale * torch.sigmoid(-z)).to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def keeps(self, g: Tensor) -> Tensor:
        """bool: which rows stay when deletion is hard."""
        if not as_strided_tensor("g", g).is_floating_point():
            raise InputError(f"g: {g.dtype}; give what the gate has returned")
        return g.detach() > -self.scale / 2


def delete(keep: Tensor, layout: Layout, group: Group | None = None) -> Merge:
    """The merge that removes rows: those that stay are groups of one. Causal. Collective.

    keep: bool (batch, rows), of this rank's rows in `layout`. Raises as `tell` does.
    """
    kept = tell_as("keep", keep, (torch.bool,), layout, group)
    where = torch.arange(layout.length, device=kept.device).expand_as(kept)
    return Merge.of(where.where(kept, DELETED))


class RateController(nn.Module):
    """How much mean(g) weighs in the loss so that the share of deleted rows goes to `target`: proportional and integral.

    p <- smooth p + (1 - smooth) kp error; i <- i + ki error; weight = p + i. Its state is part of the model's. The weight is
    negative where too much is deleted, and then the loss asks for rows back; the paper's, max(0, p + i) with smooth = 0.9, only
    ever asks for more, and deleted nearly everything in short runs of small models, whose loss does not ask for rows back.
    """

    p: Tensor
    i: Tensor

    def __init__(self, target: float, kp: float = 0.5, ki: float = 1e-5, smooth: float = 0.0) -> None:
        super().__init__()
        given = {"target": target, "kp": kp, "ki": ki, "smooth": smooth}
        self.target, self.kp, self.ki, self.smooth = (number(name, value, InputError) for name, value in given.items())
        self.register_buffer("p", torch.zeros((), dtype=torch.float64))
        self.register_buffer("i", torch.zeros((), dtype=torch.float64))

    def forward(self, deleted: Tensor) -> Tensor:
        """The weight. deleted: the share of rows deleted over all ranks, a scalar. In training, a step of the controller."""
        if as_strided_tensor("deleted", deleted).numel() != 1 or deleted.is_complex():
            raise InputError(f"deleted: {deleted.dtype} of shape {tuple(deleted.shape)}; give one number, a share of rows")
        if self.training:
            error = self.target - deleted.detach().double()
            self.p.mul_(self.smooth).add_((1 - self.smooth) * self.kp * error)
            self.i.add_(self.ki * error)
        return self.p + self.i
