"""Sums the gradients of replicated parameters over the ranks that hold the sequence.

Each rank has differentiated its own share of the loss (see `loss`), so the sum is the gradient of the whole loss. It equals the
single-process gradient up to rounding and is bit-identical on all ranks, which keeps the replicas equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn._validation import error_message, short_repr
from ringattn.comm.consistency import agree
from ringattn.comm.process_group import Group, cannot_move
from ringattn.errors import InputError
from ringattn.execution.checks import as_strided_tensor
from ringattn.nn.collectives import reduction_group, sum_over

BUCKET_BYTES = 32 << 20  # large enough for full bandwidth, small beside the gradients of a large model


def reduce_gradients(parameters: Iterable[Tensor], group: Group | None = None) -> None:
    """Replaces each parameter's `.grad` by its sum over `group`; collective.

    Args:
        parameters: the same in the same order on every rank. Those that require no gradient are skipped. A missing `.grad`
            counts as zero; where no rank has a gradient, none is created.
        group: the process group or 1-D DeviceMesh that holds the sequence; the default group, if there is one, by default.

    Raises:
        MismatchError: ranks passed different parameters. Raised on every rank.
    """
    process_group = reduction_group(group)
    trained: list[Tensor] = []
    problem = error_message(lambda: trained.extend(_trained(parameters, process_group)))
    shapes = [(tuple(p.shape), p.dtype) for p in trained]
    fields = {"call": "reduce_gradients", "shapes of parameters": sha256(repr(shapes).encode()).hexdigest()[:16]}
    agree(process_group, fields, problem, details=lambda: {"number of parameters": len(trained)})
    if process_group is None:
        return
    for bucket in _buckets(trained):
        _reduce(bucket, process_group)


def _trained(parameters: Iterable[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The parameters that require a gradient; raises `InputError` for one that is no tensor or that `group` cannot reduce."""
    try:
        listed = [] if isinstance(parameters, Tensor) else list(parameters)
    except Exception:
        raise InputError(f"parameters={short_repr(parameters)}; give model.parameters(), or a list of them") from None
    if isinstance(parameters, Tensor):
        raise InputError("parameters is one tensor; give model.parameters(), or a list of them")
    trained = [p for p in listed if as_strided_tensor("parameters: one of them", p).requires_grad]
    for p in trained:
        if p.grad is not None:
            as_strided_tensor("parameters: the gradient of one", p.grad)
        if problem := cannot_move(group, "parameters: one", p):
            raise InputError(problem)
    return trained


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in order, grouped by dtype and device, each bucket up to `BUCKET_BYTES` or one parameter."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    for of_kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for p in of_kind:
            if bucket and size + p.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += p.nbytes
        yield bucket


def _reduce(bucket: list[Tensor], group: dist.ProcessGroup) -> None:
    present = [p.grad is not None for p in bucket]
    flat = torch.cat([*_flags(present, bucket[0]), *_flat_grads(bucket)])
    sum_over(group, flat, "gradients")
    counts, *sums = flat.split([len(bucket), *(p.numel() for p in bucket)])
    # Where a gradient is missing here, the host must know whether another rank has one: one synchronisation for each bucket.
    anywhere = present if all(present) else [count > 0 for count in counts.tolist()]
    for p, wanted, total in zip(bucket, anywhere, sums, strict=True):
        if p.grad is not None:
            p.grad.copy_(total.view_as(p))
        elif wanted:
            p.grad = total.view_as(p).clone()


def _flags(values: list[bool], like: Tensor) -> Iterator[Tensor]:
    """1 or 0 for each value, filled on the device run by run: a tensor made from a list would be a synchronous copy."""
    for value, run in groupby(values):
        yield like.new_full((len(list(run)),), float(value), requires_grad=False)


def _flat_grads(bucket: list[Tensor]) -> Iterator[Tensor]:
    return (torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket)
