"""Gathers the router logits of mixture-of-experts models, so that their load-balancing loss is that of the whole batch.

With `output_router_logits` a model adds a loss over the logits of its routers: the product of two means over tokens, which is
not the mean of what ranks make of their own tokens. The model's head computes it. Where the decoder has returned the router
logits of the whole batch, and the head has the attention_mask of the whole batch, that loss is the one of one process.
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
from ringattn.integrations.transformers.outputs import gathered

FLAG = "output_router_logits"
LOGITS = "router_logits"  # of a decoder: for each layer (..., batch * rows, experts), or (batch, rows, experts)


def asked_for(batch: Mapping[str, Any], config: PretrainedConfig) -> bool:
    """Whether the model will return router logits, and a causal language model add a loss that it makes of them."""
    asked = batch.get(FLAG)
    return bool(getattr(config.get_text_config(), FLAG, False) if asked is None else asked)


def left_to_the_caller(batch: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The batch for `shard_batch`, which refuses router losses unless its caller gathers the logits."""
    return {**batch, FLAG: False} if asked_for(batch, config) else dict(batch)


def restored(own: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `shard_batch` returned, with the flag as it was in the batch."""
    rest = {name: value for name, value in own.items() if name != FLAG}
    return rest if batch.get(FLAG) is None else rest | {FLAG: batch[FLAG]}


def whole_logits(name: str, logits: Tensor, shards: Shards, factor: int) -> Tensor:
    """The router logits of the whole batch on every rank, in order and in the shape of one process; collective.

    logits: (..., batch * rows, experts) or (batch, rows, experts) of this rank. factor: as in `rows.gathered`.
    """
    rows = max(shards.rows, 1)  # a rank without rows runs on one
    if logits.ndim == 3 and logits.shape[1] == rows:
        return gathered(logits, shards, factor)
    if logits.ndim < 2 or logits.shape[-2] % rows:
        raise InputError(f"{name} has shape {tuple(logits.shape)}, which is not (batch * {rows} rows, experts)")
    by_row = logits.unflatten(-2, (-1, rows)).movedim((-3, -2), (0, 1))  # (batch, rows, ..., experts)
    return gathered(by_row, shards, factor).movedim((0, 1), (-3, -2)).flatten(-3, -2)


class Balance:
    """What became of the router logits in one call of a model: gathered, and how its loss was made of them."""

    def __init__(self) -> None:
        self.gathered = False

    def explains(self, model: Any, outputs: Mapping[str, Any], before: Tensor) -> bool:
        """Whether the loss the model returned is `before`, the mean over the tokens, plus its coefficient times `aux_loss`."""
        found, balance = outputs.get("loss"), outputs.get("aux_loss")
        if found is None or balance is None or not self.gathered:
            return False
        text = model.config.get_text_config()
        sources = ((model, "router_aux_loss_coef"), (model, "aux_loss_coef"), (text, "router_aux_loss_coef"))
        coefficient = next((getattr(s, name) for s, name in sources if hasattr(s, name)), None)
        if coefficient is None:
            return False
        return bool(torch.equal(found.detach(), before + coefficient * balance.detach().to(before.device)))


@contextmanager
def gathering(decoder: Any, shards: Shards, factor: int) -> Iterator[Balance]:
    """Within it `decoder` returns the router logits of the whole batch, and is not given the attention_mask of its head."""
    balance = Balance()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    def after(module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if kwargs.get("ringattn") is not shards:  # the model is being tried on other rows, see `rowwise`
            return outputs
        logits = outputs.get(LOGITS) if isinstance(outputs, Mapping) else None
        if logits is not None:
            outputs[LOGITS] = tuple(whole_logits(LOGITS, x, shards, factor) for x in logits)
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
