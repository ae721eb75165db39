"""Computes cross-entropy on shards: each rank its own rows, the exact mean over all of them.

Ranks hold different numbers of counted targets, so a mean of means would be wrong: sum and count are reduced separately. The
value is the global mean on each rank; the gradient is that of this rank's share, local sum / global count, so the parameter
gradients of all ranks must be summed (`reduce_gradients`). Where they are averaged instead, as by DDP and FSDP, `averaged_over`
names the number of ranks, and the gradient is larger by that factor.

Targets are shifted before the sequence is sharded: the next token of a shard's last row usually lies on another rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringattn._validation import MOST, count, error_message, short_repr
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor, check_tokens
from ringattn.kernels.lse import accum_dtype
from ringattn.nn.collectives import reduction_group, sum_over

IGNORE = -100  # also torch's default
NUMBERS = (torch.int64, torch.int32)


def shift_labels(tokens: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Makes next-token targets: tokens shifted left by one, `ignore_index` last. tokens: int64 (batch, seq_len), unsharded."""
    if as_strided_tensor("tokens", tokens).ndim != 2 or tokens.dtype not in NUMBERS:
        raise InputError(f"tokens: {tokens.dtype} of shape {tuple(tokens.shape)}; give int64 (batch, seq_len)")
    ignore_index = count("ignore_index", ignore_index, InputError, least=-MOST)
    return F.pad(tokens[:, 1:], (0, 1), value=ignore_index)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: Group | None = None,
    ignore_index: int = IGNORE,
    *,
    averaged_over: int = 1,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Computes the mean cross-entropy in nats over the rows of all ranks; collective over `group`.

    Args:
        logits: (..., vocab_size), this rank's rows; converted to fp32 (fp64 stays fp64). May have no rows.
        targets: int64 (...), this rank's, shifted before sharding: `shard(shift_labels(tokens), plan)`.
        group: the process group or 1-D DeviceMesh whose ranks share the mean: those that hold the sequence, or these and all
            replicas; the default group, if there is one, by default.
        ignore_index: targets with this value do not count. When none counts on any rank, the loss and its gradient are 0.
        averaged_over: 1 where the parameters' gradients are summed over `group`; where they are averaged, the divisor: with DDP
            or FSDP over all of `group` its size.
        num_items: the divisor of the sum of losses in place of the counted targets of this call. Under gradient accumulation:
            the counted targets of all micro-batches and all ranks, the same on every rank. The losses of the micro-batches then
            add up to the mean over all of them and must not be divided again. A tensor has one entry.

    Returns:
        A scalar, the same on every rank. Its gradient is this rank's share, times `averaged_over`.

    Raises:
        InputError: targets do not fit the logits. Raised on every rank.
    """
    process_group = reduction_group(group)
    problem = error_message(lambda: _check(logits, targets, ignore_index, averaged_over, num_items))
    same = {"averaged_over": averaged_over, "num_items": _comparable(num_items)} if problem is None else {}
    agree(process_group, {"call": "cross_entropy"} | same, problem)
    counted = (targets != ignore_index).sum()
    return mean_over(summed(logits, targets, ignore_index), counted, process_group, averaged_over, num_items)


def _comparable(num_items: int | Tensor | None) -> object:
    """The value that ranks compare. That of a tensor on a GPU is not read: a read would synchronise."""
    if isinstance(num_items, Tensor):
        return "a tensor" if num_items.device.type != "cpu" else num_items.item()
    return num_items


def _check(logits: Tensor, targets: Tensor, ignore_index: int, averaged_over: int, num_items: int | Tensor | None) -> None:
    """Raises `InputError` for arguments that do not fit."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
            raise InputError(f"num_items: {num_items.dtype} of shape {tuple(num_items.shape)}; give one number")
    elif num_items is not None and (isinstance(num_items, bool) or not isinstance(num_items, int) or num_items < 0):
        raise InputError(f"num_items={short_repr(num_items)}: counts targets, 0 or more")
    count("ignore_index", ignore_index, InputError, least=-MOST)
    if not isinstance(averaged_over, int) or not 1 <= averaged_over <= MOST:
        raise InputError(f"averaged_over={short_repr(averaged_over)}: counts ranks, 1 or more")
    if not as_strided_tensor("logits", logits).is_floating_point() or not logits.ndim or not logits.shape[-1]:
        raise InputError(f"logits: {logits.dtype} of shape {tuple(logits.shape)}; give floating-point (..., vocab_size)")
    if logits.shape[:-1] != as_strided_tensor("targets", targets).shape:
        raise InputError(
            f"targets has shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; it needs one entry per row of logits: "
            "shard both with the same plan"
        )
    check_targets(targets, logits.shape[-1], logits.device, ignore_index)


def check_targets(targets: Tensor, vocab_size: int, device: torch.device, ignore_index: int = IGNORE) -> None:
    """Raises `InputError` unless targets are token numbers of the right dtype and device."""
    if targets.dtype != torch.int64 or targets.device != device:
        raise InputError(f"targets: {targets.dtype} on {targets.device}; give int64 on {device}, the device of the logits")
    check_tokens("targets", targets, vocab_size, ignore_index)


def summed(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """The sum of this rank's losses."""
    rows = logits.flatten(0, -2).to(accum_dtype(logits.dtype))
    return F.cross_entropy(rows, targets.flatten(), ignore_index=ignore_index, reduction="sum")


def mean_over(
    local_sum: Tensor,
    local_count: Tensor,
    group: dist.ProcessGroup | None,
    averaged_over: int = 1,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Sum of all sums / sum of all counts or num_items; the gradient of `local_sum` is averaged_over / divisor."""
    mean: Tensor = _MeanOver.apply(local_sum, local_count, group, averaged_over, num_items)
    return mean


class _MeanOver(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local_sum: Tensor,
        local_count: Tensor,
        group: dist.ProcessGroup | None,
        averaged_over: int,
        num_items: int | Tensor | None,
    ) -> Tensor:
        totals = torch.stack([local_sum.double(), local_count.double()])  # fp64 counts exactly up to 2^53
        total, count = sum_over(group, totals, "loss")
        if num_items is not None:
            count = torch.as_tensor(num_items, dtype=count.dtype, device=count.device).reshape(())
        count = count.clamp(min=1)
        ctx.share = averaged_over / count
        mean: Tensor = (total / count).to(local_sum.dtype)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (grad * ctx.share).to(grad.dtype), None, None, None, None
