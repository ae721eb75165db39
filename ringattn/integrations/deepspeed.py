"""Replaces DeepSpeed's sequence-parallel attention by ringattn's, with any number of heads and no other change to a job.

    mpu = register_with_transformers(model, "sdpa", sequence_parallel_size, micro_batch_size)   # or sequence_parallel(size)
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=...)
    loss = sp_loss(engine(input_ids=..., position_ids=...).logits, shift_labels, engine)

`register_with_transformers` replaces that of `UlyssesSPAttentionHF` and takes the batches of `UlyssesSPDataLoaderAdapter`: each
rank holds a contiguous part of the sequence. `DistributedAttention` replaces the class of that name in `deepspeed.sequence`.
DeepSpeed reduces gradients correctly only with an `mpu`: with a mesh, ZeRO 0 to 2 leave out the sequence group, which is
refused here. Interfaces: https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from ringattn.comm.consistency import agree
from ringattn.errors import InputError
from ringattn.execution.attention import attention, cast_dtype
from ringattn.integrations.mpu import SequenceParallel, sequence_parallel
from ringattn.nn.loss import IGNORE, cross_entropy
from ringattn.planner import make_plan
from ringattn.planner.topology import Topology
from ringattn.sequence.layout import contiguous
from ringattn.sequence.mask import Mask, causal, full

__all__ = ["DistributedAttention", "SequenceParallel", "register_with_transformers", "sequence_parallel", "sp_loss"]

MESH = (
    "this job gave deepspeed.initialize mesh_param, or sequence_parallel_size and data_parallel_size in its config: DeepSpeed "
    "then leaves the sequence group out when ZeRO 0, 1 and 2 reduce gradients, and each rank trains on its own part alone. "
    "Leave them out and pass mpu=ringattn.integrations.deepspeed.sequence_parallel(size)"
)


def sp_loss(logits: Tensor, shift_labels: Tensor, engine: Any, ignore_index: int = IGNORE) -> Tensor:
    """Computes the mean cross-entropy in nats over the tokens of all ranks, with the gradient that the ZeRO stage requires.

    With an `mpu`, ZeRO 0, 1 and 2 sum gradients over the ranks of a sequence and average over replicas; ZeRO 3 averages over
    all ranks. The loss is the same on each rank; its gradient compensates for the divisor of the stage.

    Args:
        logits: (batch, rows, vocab_size), of this rank.
        shift_labels: int64 (batch, rows), shifted before the sequence was cut, as `UlyssesSPDataLoaderAdapter` has them.
        engine: what `deepspeed.initialize(mpu=...)` returned.
        ignore_index: targets with this value do not count.

    Raises:
        InputError: labels do not fit, or the engine has no groups for sequences. Raised on every rank.
    """
    problem = _unreduced(engine.mpu)
    if problem:  # what deepspeed.initialize was given: the same on all ranks
        raise InputError(problem)
    all_ranks = engine.mpu.get_sequence_data_parallel_group()
    ranks = dist.get_world_size(all_ranks)
    divided_by = ranks if engine.zero_optimization_stage() == 3 else ranks // engine.mpu.get_sequence_parallel_world_size()
    return cross_entropy(logits, shift_labels, all_ranks, ignore_index, averaged_over=divided_by)


def _unreduced(mpu: Any) -> str | None:
    """The reason why DeepSpeed would not reduce gradients over the sequence, or None."""
    if problem := _mesh():
        return problem
    if not hasattr(mpu, "get_sequence_parallel_world_size"):
        return (
            "the engine has no groups for sequences, so DeepSpeed treats all ranks as replicas: call "
            "deepspeed.initialize(..., mpu=ringattn.integrations.deepspeed.sequence_parallel(size))"
        )
    return None


def register_with_transformers(
    model_name_or_path: Any,
    core_attn_implementation: str,
    sequence_parallel_size: int,
    micro_batch_size: int,
    seq_length: int | None = None,
    seq_length_is_variable: bool = True,
    disable_in_eval: bool = False,
    *,
    schedule: str = "auto",
    topology: Topology | str | None = None,
) -> SequenceParallel | None:
    """Replaces one of transformers' attentions by ringattn; as `UlyssesSPAttentionHF.register_with_transformers`.

    Every forward of a model with that attention then needs `position_ids` (batch or 1, rows): this rank's part of those of
    the whole sequence, restarting with each packed document. Ranks may hold parts of different lengths. `attention_mask`
    (batch, rows), which DeepSpeed drops, is honoured.

    Args:
        model_name_or_path: a model, or a name or path for AutoConfig.from_pretrained.
        core_attn_implementation: the attention to replace: the model's `attn_implementation`, such as "sdpa".
        sequence_parallel_size: ranks per sequence; with 1 nothing is done and None returned.
        micro_batch_size: sequences per forward; another number is refused.
        seq_length: length of the whole sequences, where `seq_length_is_variable` is False.
        disable_in_eval: a model in eval mode keeps its own attention, and whole sequences.
        schedule: for `make_plan`.
        topology: for `make_plan`.

    Returns:
        mpu for `deepspeed.initialize`.

    Raises:
        InputError: the model cannot be sharded, or does not use that attention.
    """
    if sequence_parallel_size == 1:
        return None
    from ringattn.integrations.transformers.gathered import replace_attention  # only this function needs transformers

    length = None if seq_length_is_variable else seq_length
    if not seq_length_is_variable and seq_length is None:
        raise InputError("seq_length_is_variable=False needs seq_length, the length of the whole sequence")
    mpu = sequence_parallel(sequence_parallel_size)
    make = partial(make_plan, world=sequence_parallel_size, schedule=schedule, topology=topology)
    shape = (micro_batch_size, length)
    replace_attention(
        model_name_or_path, core_attn_implementation, mpu.get_sequence_parallel_group(), make, shape, disable_in_eval, _mesh
    )
    return mpu


def _mesh() -> str | None:
    return MESH if groups.mesh_device is not None else None


class DistributedAttention(nn.Module):
    """Replaces `deepspeed.sequence.layer.DistributedAttention`: same constructor, same call, any number of heads.

    ringattn computes attention itself, so `local_attention` is not called; it only specifies the attention: a `ringattn.Mask`,
    or a module with a bool `causal` or `is_causal` and an optional `softmax_scale`, as flash attention modules have.

    Args:
        local_attention: specifies mask and scale.
        sequence_process_group: the ranks of a sequence; each holds an equal contiguous part.
        scatter_idx: dimension of heads: 2.
        gather_idx: dimension of the sequence: 0, or 1 where the batch comes first.
        sp_stream: None. Communication overlaps with compute in any case.
        num_kv_heads: None, or the number of heads of the keys.
        schedule: for `make_plan`.
        topology: for `make_plan`.

    Raises:
        InputError: `local_attention` does not specify its mask, or one that cannot be sharded.
    """

    def __init__(
        self,
        local_attention: nn.Module | Mask,
        sequence_process_group: dist.ProcessGroup,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: None = None,
        num_kv_heads: int | None = None,
        *,
        schedule: str = "auto",
        topology: Topology | str | None = None,
    ) -> None:
        super().__init__()
        if sp_stream is not None:
            raise InputError("sp_stream: ringattn overlaps communication with compute by itself; leave sp_stream out")
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise InputError(f"scatter_idx={scatter_idx}, gather_idx={gather_idx}: heads are dimension 2, the sequence 0 or 1")
        self.mask, self.scale = _mask_and_scale(local_attention)
        self.group, self.gather_idx, self.num_kv_heads = sequence_process_group, gather_idx, num_kv_heads
        self.world, self.rank = dist.get_world_size(sequence_process_group), dist.get_rank(sequence_process_group)
        self.make = partial(make_plan, world=self.world, schedule=schedule, topology=topology)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """query: (rows, batch, heads, head_dim), or (batch, rows, heads, head_dim) with gather_idx 1; key, value alike.

        rotary_pos_emb: cos and sin of the whole sequence, (1, seq_len, 1, rotary_dim), applied here as DeepSpeed does.
        Returns `query`'s shape.
        """
        if problem := self._problem(query, key, batch_dim_idx, args, kwargs):
            agree(self.group, {}, problem)  # matches the `agree` call of `attention` on the other ranks, which then raise too
        q, k, v = (x if self.gather_idx else x.transpose(0, 1) for x in (query, key, value))
        rows = q.shape[1]
        if rotary_pos_emb is not None:
            own = slice(self.rank * rows, (self.rank + 1) * rows)
            q, k = (_rotated(x, *(table[:, own].to(x.dtype) for table in rotary_pos_emb)) for x in (q, k))
        plan = self.make(
            rows * self.world,
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            dtype=cast_dtype(q),
            mask=self.mask,
            layout=contiguous(rows * self.world, self.world),
        )
        out: Tensor = attention(q, k, v, plan, scale=self.scale, group=self.group)
        return out if self.gather_idx else out.transpose(0, 1).contiguous()

    def _problem(self, query: Tensor, key: Tensor, batch_dim_idx: int, args: Any, kwargs: dict[str, Any]) -> str | None:
        if query.ndim != 4 or key.ndim != 4:
            return f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}; pass 4 dimensions, heads in dimension 2"
        if batch_dim_idx != 1 - self.gather_idx:
            return (
                f"batch_dim_idx={batch_dim_idx} and gather_idx={self.gather_idx}: one of 0 and 1 is batch, the other sequence"
            )
        if self.num_kv_heads not in (None, key.shape[2]):
            return f"num_kv_heads={self.num_kv_heads} and key has {key.shape[2]} heads"
        extra = [
            *(f"argument {n + 6}" for n, x in enumerate(args) if x is not None),
            *(k for k, x in kwargs.items() if x is not None),
        ]
        if extra:
            return f"{', '.join(extra)}: meant for the local attention, which ringattn does not call; pass the mask instead"
        return None


def _mask_and_scale(local: Any) -> tuple[Mask, float | None]:
    """The mask and the scale that a local attention specifies."""
    if isinstance(local, Mask):
        return local, None
    is_causal_flag = getattr(local, "causal", getattr(local, "is_causal", None))
    if not isinstance(is_causal_flag, bool):
        raise InputError(
            f"local_attention is a {type(local).__name__} that does not specify its mask, and ringattn computes attention "
            "itself: pass a ringattn.Mask (ringattn.causal(), ringattn.full(), ...), or a module with a bool attribute causal"
        )
    options = {name: getattr(local, name, None) for name in ("dropout", "dropout_p", "attention_dropout", "window_size")}
    unsupported = {name: value for name, value in options.items() if value not in (None, 0, 0.0, (-1, -1))}
    if unsupported:
        raise InputError(
            f"local_attention asks for {unsupported}, which would be lost: set it to None, or pass the window as a "
            "ringattn.Mask"
        )
    return (causal() if is_causal_flag else full()), getattr(local, "softmax_scale", None)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions as DeepSpeed does: halves are rotated, channels beyond the tables are unchanged."""
    rotated, unrotated = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, unrotated), dim=-1)
