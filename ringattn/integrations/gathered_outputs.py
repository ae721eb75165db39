"""Refuses what a model makes of one rank's rows alone, where batches come to the ranks already cut.

DeepSpeed's jobs hand no `Shards` to the model: its first layer makes them, or finds them. So the outermost model that was
called is checked if attention on shards ran within its call. See `rows` for how results are recognised, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from ringattn.integrations.rows import agree_on_rows
from ringattn.integrations.shards import Shards

CURE = (
    "Let the model return logits of its rows (no labels, no logits_to_keep, no output_router_logits) and make the loss with "
    "ringattn.integrations.deepspeed.sp_loss(logits, shift_labels, engine). Rewards, classes of sequences and load-balancing "
    "losses need ringattn.integrations.whole.forward_whole(model, batch, group) or ringattn.integrations.trainer, with DDP or "
    "FSDP in DeepSpeed's place"
)


class LastUsed:
    """The `Shards` that attention has used since the outermost model of transformers was called, or None."""

    def __init__(self) -> None:
        self.shards: Shards | None = None
        self.within = False

    def note(self, shards: Shards) -> None:
        if self.within:  # not where a layer is recomputed in backward
            self.shards = shards


def check_outputs_of(used: LastUsed) -> None:
    """Let every model of transformers, in whose call attention sets `used.shards`, check that it returns its rows."""
    call: Callable[..., Any] = PreTrainedModel.__call__

    @wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if used.within:  # models within the outermost return what they like to it
            return call(self, *args, **kwargs)
        used.shards, used.within = None, True
        try:
            outputs = call(self, *args, **kwargs)
        finally:
            used.within = False
        if used.shards is not None:
            agree_on_rows(outputs, used.shards, type(self).__name__, CURE)
            used.shards = None
        return outputs

    PreTrainedModel.__call__ = checked  # type: ignore[method-assign]
