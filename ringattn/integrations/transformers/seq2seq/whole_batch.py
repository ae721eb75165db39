"""Implements `forward_whole` for encoder-decoder language models: all on rows, with the global loss where it is the usual one.

Whether a model's loss is the mean cross-entropy of unshifted labels is determined by comparing its value for this rank's rows
with that mean; whether it divides by num_items_in_batch, by passing an otherwise meaningless number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ringattn.comm.process_group import Group
from ringattn.errors import InputError
from ringattn.integrations.transformers.attention_interface import NAME, shard_batch
from ringattn.integrations.transformers.outputs import GatheredOutputs
from ringattn.integrations.transformers.seq2seq.batch import DecoderShards
from ringattn.integrations.transformers.seq2seq.decoder_inputs import with_decoder_inputs
from ringattn.integrations.transformers.seq2seq.stacks import on_stacks
from ringattn.nn.collectives import reduction_group, sum_over
from ringattn.nn.loss import IGNORE, cross_entropy, summed

MEAN, DIVIDED, OTHER = range(3)  # over the targets, by num_items_in_batch, or another loss altogether


def run_seq2seq_on_rows(
    model: nn.Module, inner: Any, batch: dict[str, Any], group: Group | None, averaged_over: int, sharding: dict[str, Any]
) -> GatheredOutputs | None:
    """Computes the outputs of one process; None where the model has another loss, so the head must run on the whole.

    Raises `InputError` on every rank where it must and the model has no separate head.
    """
    batch = dict(batch)
    items = batch.pop("num_items_in_batch", None)
    own, targets = shard_batch(with_decoder_inputs(batch, inner.config, type(inner)), inner.config, group, **sharding)
    shards: DecoderShards = own[NAME]
    shards.check_outputs = False  # the global loss is not a tensor of rows
    count = 0 if targets is None else int((targets != IGNORE).sum())
    probe = {} if targets is None else {"labels": targets} | ({} if items is None else {"num_items_in_batch": 2 * count + 1})
    with on_stacks(inner, shards):
        outputs = model(**own, **probe, return_dict=True)
    if targets is None:
        return GatheredOutputs(outputs, shards, averaged_over, ())
    logits: Tensor = outputs["logits"]
    kind = _agreed_kind(_kind_of_loss(outputs.get("loss"), logits.detach(), targets, count), group, logits.device)
    if kind == OTHER:
        if inner.base_model is inner:
            raise InputError(
                f"the loss of {type(inner).__name__} is not the mean cross-entropy of its labels, so it cannot be computed on "
                "shards: leave labels out, give decoder_input_ids, and compute the loss from the logits"
            )
        return None
    loss = cross_entropy(logits, targets, group, averaged_over=averaged_over, num_items=items if kind == DIVIDED else None)
    return GatheredOutputs({**outputs, "loss": loss}, shards, averaged_over, ("loss",))


def _kind_of_loss(loss: Tensor | None, logits: Tensor, targets: Tensor, count: int) -> int | None:
    """Classifies the `loss` of this rank's rows; None where this rank has no targets."""
    if loss is None or logits.shape[:-1] != targets.shape:
        return OTHER
    if count == 0:
        return None
    total = summed(logits, targets)
    close = 16 * torch.finfo(loss.dtype).eps  # a model may sum in the dtype of its logits
    for kind, divisor in ((MEAN, count), (DIVIDED, 2 * count + 1)):
        if abs(loss.item() - total.item() / divisor) <= close * abs(total.item() / divisor):
            return kind
    return OTHER


def _agreed_kind(kind: int | None, group: Group | None, device: torch.device) -> int:
    """The common kind of all ranks; `OTHER` where they differ."""
    flags = torch.zeros(3, dtype=torch.float64, device=device)
    if kind is not None:
        flags[kind] = 1
    kinds = sum_over(reduction_group(group), flags, "kinds of loss").nonzero().flatten().tolist()
    return MEAN if not kinds else kinds[0] if len(kinds) == 1 else OTHER
