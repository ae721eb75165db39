"""Gathers the router logits of mixture-of-experts models, so that their load-balancing loss is that of the whole batch.

With `output_router_logits` a model adds a loss over the logits of its routers: the product of two means over tokens, which is
not the mean of the losses of ranks. The model's head computes it. Where the decoder returns the router logits of the whole
batch, and the head has the attention_mask of the whole batch, that loss equals the one of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ringattn.errors import InputError
from ringattn.integrations.transformers.batch import Shards
from ringattn.integrations.transformers.outputs import gather_sequence

FLAG = "output_router_logits"
LOGITS = "router_logits"  # decoder output: for each layer (..., batch * rows, experts), or (batch, rows, experts)


def wants_router_logits(batch: Mapping[str, Any], config: PretrainedConfig) -> bool:
    """Whether the model returns router logits and, as a causal language model, adds a loss computed from them."""
    flag = batch.get(FLAG)
    return bool(getattr(config.get_text_config(), FLAG, False) if flag is None else flag)


def without_router_logits(batch: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Returns the batch with the flag off for `shard_batch`, which refuses router losses; the caller gathers the logits."""
    return {**batch, FLAG: False} if wants_router_logits(batch, config) else dict(batch)


def with_router_logits(own: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the output of `shard_batch` with the flag of the batch restored."""
    inputs = {name: value for name, value in own.items() if name != FLAG}
    return inputs if batch.get(FLAG) is None else inputs | {FLAG: batch[FLAG]}


def gather_router_logits(name: str, logits: Tensor, shards: Shards, factor: int) -> Tensor:
    """Gathers the router logits of the whole batch, in order and in the shape of one process; collective.

    logits: (..., batch * rows, experts) or (batch, rows, experts) of this rank. factor: as in `outputs.gather_sequence`.
    """
    rows = max(shards.rows, 1)  # a rank without rows runs on one row
    if logits.ndim == 3 and logits.shape[1] == rows:
        return gather_sequence(logits, shards, factor)
    if logits.ndim < 2 or logits.shape[-2] % rows:
        raise InputError(f"{name} has shape {tuple(logits.shape)}, which is not (batch * {rows} rows, experts)")
    by_row = logits.unflatten(-2, (-1, rows)).movedim((-3, -2), (0, 1))  # (batch, rows, ..., experts)
    return gather_sequence(by_row, shards, factor).movedim((0, 1), (-3, -2)).flatten(-3, -2)


class Balance:
    """Records whether router logits were gathered in a call, and checks the loss computed from them."""

    def __init__(self) -> None:
        self.gathered = False

    def accounts_for_loss(self, model: Any, outputs: Mapping[str, Any], before: Tensor) -> bool:
        """Whether the returned loss is `before`, the mean over tokens, plus the coefficient times `aux_loss`."""
        loss, balance = outputs.get("loss"), outputs.get("aux_loss")
        if loss is None or balance is None or not self.gathered:
            return False
        text = model.config.get_text_config()
        sources = ((model, "router_aux_loss_coef"), (model, "aux_loss_coef"), (text, "router_aux_loss_coef"))
        coefficient = next((getattr(s, name) for s, name in sources if hasattr(s, name)), None)
        if coefficient is None:
            return False
        return bool(torch.equal(loss.detach(), before + coefficient * balance.detach().to(before.device)))


@contextmanager
def gathering(decoder: Any, shards: Shards, factor: int) -> Iterator[Balance]:
    """Makes `decoder` return the router logits of the whole batch, without the attention_mask that is for the head."""
    balance = Balance()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    def after(module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if kwargs.get("ringattn") is not shards:  # a trial on other rows, see `rowwise`
            return outputs
        logits = outputs.get(LOGITS) if isinstance(outputs, Mapping) else None
        if logits is not None:
            outputs[LOGITS] = tuple(gather_router_logits(LOGITS, x, shards, factor) for x in logits)
            balance.gathered = True
        return outputs

    hooks = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield balance
    finally:
        for hook in hooks:
            hook.remove()
