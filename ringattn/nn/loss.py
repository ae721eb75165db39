"""Cross-entropy on shards: each rank's own rows, the exact mean over all of them.

Ranks hold different numbers of counted targets, so a mean of means would be wrong: sum and count are reduced separately.
The value is the global mean on each rank; the gradient is that of this rank's own share, local sum / global count, so that the
parameter gradients of all ranks have to be summed (`reduce_gradients`), not averaged.

Targets are shifted before the sequence is cut: the next token of a shard's last row usually lives on another rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringattn.comm.agree import agree
from ringattn.comm.group import Group
from ringattn.nn.group import reduction_group, sum_over
from ringattn.partial import accum_dtype

IGNORE = -100  # torch's default too


def shift_labels(tokens: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Next-token targets: tokens one to the left, `ignore_index` last. tokens: int64 (batch, seq_len), not yet sharded."""
    return F.pad(tokens[:, 1:], (0, 1), value=ignore_index)


def cross_entropy(logits: Tensor, targets: Tensor, group: Group | None = None, ignore_index: int = IGNORE) -> Tensor:
    """Mean cross-entropy in nats over the rows of all ranks; collective over `group`.

    Args:
        logits: (..., vocab_size), this rank's rows; computed on in fp32 (fp64 stays fp64). May have no rows at all.
        targets: int64 (...), this rank's, shifted before sharding: `shard(shift_labels(tokens), plan)`.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group, if there is one, by default.
        ignore_index: targets with this value do not count. When none counts anywhere, the loss is 0 and so is its gradient.

    Returns:
        A scalar, the same on every rank. Its gradient is this rank's share: sum the parameters' gradients over `group`.

    Raises:
        InputError: targets do not fit the logits. Raised on every rank.
    """
    problem = None
    if logits.shape[:-1] != targets.shape:
        problem = (
            f"targets has shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; it needs one entry per row of logits: "
            "shard both with the same plan"
        )
    process_group = reduction_group(group)
    agree(process_group, {"loss": "cross_entropy"}, problem)
    return mean_over(summed(logits, targets, ignore_index), (targets != ignore_index).sum(), process_group)


def summed(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """The sum of this rank's losses, not yet divided by anything."""
    rows = logits.flatten(0, -2).to(accum_dtype(logits.dtype))
    return F.cross_entropy(rows, targets.flatten(), ignore_index=ignore_index, reduction="sum")


def mean_over(local_sum: Tensor, local_count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of all sums / sum of all counts; backward gives `local_sum` the gradient 1 / sum of all counts."""
    mean: Tensor = _MeanOver.apply(local_sum, local_count, group)
    return mean


class _MeanOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_sum: Tensor, local_count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        totals = torch.stack([local_sum.double(), local_count.double()])  # fp64 counts exactly up to 2^53
        total, count = sum_over(group, totals, "loss")
        ctx.count = count.clamp(min=1)
        mean: Tensor = (total / ctx.count).to(local_sum.dtype)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad / ctx.count).to(grad.dtype), None, None
