"""Adds an integration: models that call torch's scaled_dot_product_attention run on shards, as they are.

with ShardedAttention(plan):
    y = model(shard(x, plan))       # rows of this rank; positions, if the model has any, are those of `positions(plan)`
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringattn import InputError, Plan, attention, causal


class ShardedAttention(TorchFunctionMode):
    """Within it, `F.scaled_dot_product_attention` is exact attention over the rows of all ranks, by `plan`."""

    def __init__(self, plan: Plan, group: Any = None) -> None:
        super().__init__()
        self.plan, self.group = plan, group

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = self._attend if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,  # (batch, heads, rows, head_dim), as for torch's function
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        # Nothing is accepted and ignored: what the plan does not do is refused.
        if attn_mask is not None or dropout_p:
            raise InputError("attn_mask and dropout_p: the plan has the mask and attention has no dropout; leave both out")
        if is_causal != (self.plan.mask == causal()):
            raise InputError(f"is_causal={is_causal} and the plan's mask is {self.plan.mask}; make both say the same")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return attention(q, k, v, self.plan, scale=scale, group=self.group).transpose(1, 2)
