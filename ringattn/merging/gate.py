"""Deletes rows by a learned gate, and controls how many it deletes: MrT5.

The gate computes a number g in (-10, 0] for each row. In training g is added to the row's key logits, which fades the row
and removes nothing; in evaluation rows below -5 are removed. The gate of a row reads only that row, so it is causal. A PI
controller turns the error of the deletion rate over all ranks into the weight of mean(g) in the loss. Kallini et al. 2024,
https://arxiv.org/abs/2410.20771; one difference: deleted rows bypass the layers instead of ending, since a decoder has to
predict at every row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ringattn._validation import count, number
from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor
from ringattn.merging.exchange import gather_named_rows
from ringattn.merging.merge import DELETED, Merge
from ringattn.sequence.layout import Layout

MOST_CHANNELS = 1 << 24


class DeleteGate(nn.Module):
    """Computes g = -scale * sigmoid(-(w . rms_norm(x) + b)) for each row: 0 keeps the row, -scale deletes it."""

    def __init__(self, dim: int, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = number("scale", scale, InputError, above=0)
        self.weight = nn.Parameter(torch.zeros(count("dim", dim, InputError, most=MOST_CHANNELS)))
        self.bias = nn.Parameter(torch.ones(()))  # keeps almost all rows at first

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, rows, dim). Returns (batch, rows) in fp32, fp64 for fp64.

        The order of summation within a row does not depend on the number of rows, so results are the same on any number of
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
        """bool, the shape of g: which rows are kept when rows are removed."""
        if not as_strided_tensor("g", g).is_floating_point():
            raise InputError(f"g: {g.dtype}; give the gate's output")
        return g.detach() > -self.scale / 2


def delete(keep: Tensor, layout: Layout, group: Group | None = None) -> Merge:
    """Makes the merge that removes rows; each kept row is a group of one. Causal. Collective.

    keep: bool (batch, rows), of this rank's rows in `layout`. Raises as `gather_rows` does.
    """
    kept = gather_named_rows("keep", keep, (torch.bool,), layout, group)
    index = torch.arange(layout.length, device=kept.device).expand_as(kept)
    return Merge.of(index.where(kept, DELETED))


class RateController(nn.Module):
    """Controls the weight of mean(g) in the loss so that the share of deleted rows approaches `target`: a PI controller.

    p <- smooth p + (1 - smooth) kp error; i <- i + ki error; weight = p + i. Its state is part of the model's state dict. The
    weight is negative where too many rows are deleted, and the loss then reduces deletion. The paper's weight, max(0, p + i)
    with smooth = 0.9, can only increase deletion; in short runs of small models it deleted nearly all rows.
    """

    p: Tensor
    i: Tensor

    def __init__(self, target: float, kp: float = 0.5, ki: float = 1e-5, smooth: float = 0.0) -> None:
        super().__init__()
        options = {"target": target, "kp": kp, "ki": ki, "smooth": smooth}
        self.target, self.kp, self.ki, self.smooth = (number(name, value, InputError) for name, value in options.items())
        self.register_buffer("p", torch.zeros((), dtype=torch.float64))
        self.register_buffer("i", torch.zeros((), dtype=torch.float64))

    def forward(self, deleted: Tensor) -> Tensor:
        """Returns the weight; in training also updates the controller. deleted: the share of rows deleted over all ranks, a
        scalar."""
        if as_strided_tensor("deleted", deleted).numel() != 1 or deleted.is_complex():
            raise InputError(f"deleted: {deleted.dtype} of shape {tuple(deleted.shape)}; give one number, a share of rows")
        if self.training:
            error = self.target - deleted.detach().double()
            self.p.mul_(self.smooth).add_((1 - self.smooth) * self.kp * error)
            self.i.add_(self.ki * error)
        return self.p + self.i
