"""DeepSpeed: its sequence parallelism with ringattn inside. Any number of heads; nothing else in a job changes.

    mpu = register_with_transformers(model, "sdpa", sequence_parallel_size, micro_batch_size)   # or sequence_parallel(size)
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=...)
    loss = sp_loss(engine(input_ids=..., position_ids=...).logits, shift_labels, engine)

`register_with_transformers` stands where `UlyssesSPAttentionHF`'s does and takes the batches of `UlyssesSPDataLoaderAdapter`:
each rank has its part of the sequence, the parts one behind another. `DistributedAttention` stands where `deepspeed.sequence`'s
does. Gradients are DeepSpeed's to reduce, and it does so rightly only for an `mpu`: with a mesh, ZeRO 0 to 2 leave the sequence
group out, which is refused here. Interfaces: https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/
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
    """Mean cross-entropy in nats over the tokens of all ranks, whose gradient is right at the engine's ZeRO stage.

    With an `mpu`, ZeRO 0, 1 and 2 sum gradients over the ranks of a sequence and average over replicas; ZeRO 3 averages over
    all ranks. The loss is the same on each rank; its gradient makes up for what the stage divides by.

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
    everyone = engine.mpu.get_sequence_data_parallel_group()
    ranks = dist.get_world_size(everyone)
    divided_by = ranks if engine.zero_optimization_stage() == 3 else ranks // engine.mpu.get_sequence_parallel_world_size()
    return cross_entropy(logits, shift_labels, everyone, ignore_index, averaged_over=divided_by)


def _unreduced(mpu: Any) -> str | None:
    """Why DeepSpeed would not reduce gradients over the sequence, or None."""
    if problem := _mesh():
        return problem
    if not hasattr(mpu, "get_sequence_parallel_world_size"):
        return (
            "the engine has no groups for sequences, so DeepSpeed takes all ranks for replicas: call "
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
    """Put ringattn in the place of one of transformers' attentions; as `UlyssesSPAttentionHF.register_with_transformers`.

    Every forward of a model with that attention then needs `position_ids` (batch or 1, rows): this rank's part of the whole
    sequence's, beginning anew with each packed document. Ranks may hold parts of different lengths. `attention_mask`
    (batch, rows), which DeepSpeed drops, is honoured.

    Args:
        model_name_or_path: a model, or what AutoConfig.from_pretrained takes.
        core_attn_implementation: whose place ringattn takes: the model's `attn_implementation`, such as "sdpa".
        sequence_parallel_size: ranks per sequence; with 1 nothing is done and None returned.
        micro_batch_size: sequences per forward; another number is refused.
        seq_length: whole length of every batch, where `seq_length_is_variable` is False.
        disable_in_eval: a model in eval mode keeps its own attention, and whole sequences.
        schedule: for `make_plan`.
        topology: for `make_plan`.

    Returns:
        mpu for `deepspeed.initialize`.

    Raises:
        InputError: the model cannot be cut, or does not use that attention.
    """
    if sequence_parallel_size == 1:
        return None
    from ringattn.integrations.transformers.gathered import take_place  # transformers is needed for this function alone

    length = None if seq_length_is_variable else seq_length
    if not seq_length_is_variable and seq_length is None:
        raise InputError("seq_length_is_variable=False needs seq_length, the length of the whole sequence")
    mpu = sequence_parallel(sequence_parallel_size)
    make = partial(make_plan, world=sequence_parallel_size, schedule=schedule, topology=topology)
    shape = (micro_batch_size, length)
    take_place(
        model_name_or_path, core_attn_implementation, mpu.get_sequence_parallel_group(), make, shape, disable_in_eval, _mesh
    )
    return mpu


def _mesh() -> str | None:
    return MESH if groups.mesh_device is not None else None


class DistributedAttention(nn.Module):
    """In the place of `deepspeed.sequence.layer.DistributedAttention`: same constructor, same call, any number of heads.

    ringattn computes attention itself, so `local_attention` is not called: it says what is meant. A `ringattn.Mask`, or a
    module with a bool `causal` or `is_causal` and perhaps `softmax_scale`, as flash attention modules have.

    Args:
        local_attention: what attention is meant.
        sequence_process_group: the ranks of a sequence; each holds an equal part, one behind another.
        scatter_idx: dimension of heads: 2.
        gather_idx: dimension of the sequence: 0, or 1 where the batch comes first.
        sp_stream: None. Communication overlaps with compute in any case.
        num_kv_heads: None, or what the keys have.
        schedule: for `make_plan`.
        topology: for `make_plan`.

    Raises:
        InputError: `local_attention` does not say what it means, or means what cannot be cut.
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
        self.mask, self.scale = _meaning(local_attention)
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
            agree(self.group, {}, problem)  # meets the others' agreement on `attention`, so that they hear of it
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
        more = [
            *(f"argument {n + 6}" for n, x in enumerate(args) if x is not None),
            *(k for k, x in kwargs.items() if x is not None),
        ]
        if more:
            return f"{', '.join(more)}: meant for the local attention, which ringattn does not call; say the mask in its place"
        return None


def _meaning(local: Any) -> tuple[Mask, float | None]:
    """The mask and the scale that a local attention stands for."""
    if isinstance(local, Mask):
        return local, None
    told = getattr(local, "causal", getattr(local, "is_causal", None))
    if not isinstance(told, bool):
        raise InputError(
            f"local_attention is a {type(local).__name__} that does not say what it computes, and ringattn computes it itself: "
            "pass a ringattn.Mask (ringattn.causal(), ringattn.full(), ...), or a module with a bool attribute causal"
        )
    dropped = {name: getattr(local, name, None) for name in ("dropout", "dropout_p", "attention_dropout", "window_size")}
    odd = {name: value for name, value in dropped.items() if value not in (None, 0, 0.0, (-1, -1))}
    if odd:
        raise InputError(
            f"local_attention asks for {odd}, which would be lost: set it to None, or say the window as a ringattn.Mask"
        )
    return (causal() if told else full()), getattr(local, "softmax_scale", None)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as DeepSpeed applies them: halves are rotated, what lies beyond the tables passes."""
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, passed), dim=-1)
