"""Hugging Face Trainer: the sequences of each batch cut over some of its ranks, the rest of the ranks being replicas.

    class MyTrainer(SequenceParallel, Trainer): ...
    MyTrainer(model, args, train_dataset=dataset, sequence_parallel_size=2).train()

World rank = replica x sequence_parallel_size + place in the sequence. Three things differ from plain data parallelism, and
they are all that is here: the ranks of a sequence are given the same batch, the batch is cut before the model sees it, and the
loss is the mean over the tokens of all ranks. Gradients stay what Trainer makes of them, an average over all ranks by DDP or
FSDP, so the loss is scaled for that.

accelerate knows two ways of its own to cut a sequence and takes no third, so its `ParallelismConfig` stays empty. Under
DeepSpeed the loss depends on the ZeRO stage, see `deepspeed`; that is refused here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from ringattn.errors import InputError
from ringattn.functional import cast_dtype
from ringattn.integrations.transformers import NAME, register, shard_batch
from ringattn.nn.loss import cross_entropy

if TYPE_CHECKING:  # at run time a mixin, so that it goes with any subclass of Trainer
    from transformers import Trainer as Base
else:
    Base = object


class SequenceParallel(Base):
    """A mixin for `transformers.Trainer` and its subclasses; name it first. Needs a causal language model of transformers.

    Args, beside those of the trainer:
        sequence_parallel_size: ranks that share each sequence; divides the number of ranks. Further keywords for `shard_batch`,
            as schedule and layout, go into `sharding`.

    Raises:
        InputError: the number of ranks is not a multiple of it, or the job runs under DeepSpeed or one of accelerate's own ways
            to cut a sequence.

    Batches must be the same wherever a dataset is read, so an iterable dataset must yield the same on every rank. In `evaluate`
    only the loss is meant: set `prediction_loss_only=True`, since logits are those of a rank's own rows.
    """

    loss_is_scaled_for_ga = False  # a mean of one micro-batch; Trainer divides by their number

    def __init__(self, *args: Any, sequence_parallel_size: int, sharding: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        problem = _unfit(self, sequence_parallel_size)
        if problem:
            raise InputError(problem)
        self.sharding = sharding or {}
        self.mesh = _mesh(self.args.device.type, sequence_parallel_size)
        register()
        self.accelerator.unwrap_model(self.model).set_attn_implementation(NAME)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return _by_replica(super().get_train_dataloader(), self.mesh)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return _by_replica(super().get_eval_dataloader(eval_dataset), self.mesh)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences in an optimizer step, over all replicas."""
        ranks: int = super().get_total_train_batch_size(args)
        return ranks // self.mesh["sequence"].size()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over the tokens of all ranks. inputs: a whole batch with labels, the same on the ranks of a sequence."""
        if "labels" not in inputs:
            raise InputError(f"the batch has no labels, only {', '.join(inputs)}; use a data collator that adds them")
        config = self.accelerator.unwrap_model(model).config
        # Not the config's dtype: the rank that saves a model writes into its own config what the model has become.
        sharding = {"dtype": cast_dtype(next(model.parameters())), **self.sharding}
        own, targets = shard_batch(inputs, config, self.mesh["sequence"], **sharding)
        assert targets is not None  # there are labels
        outputs = model(**own)
        loss: Tensor = cross_entropy(outputs.logits, targets, averaged_over=dist.get_world_size())
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss


def _unfit(trainer: Any, size: int) -> str | None:
    """Why this job cannot cut its sequences, or None."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        return f"sequence_parallel_size={size} does not divide the {world} ranks of this job"
    if world == 1:
        return "there is one process and no process group: start the script with torchrun --nproc-per-node N"
    if trainer.is_deepspeed_enabled:
        return "this job runs under DeepSpeed, whose gradients depend on the ZeRO stage: see ringattn.integrations.deepspeed"
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        return "accelerate's ParallelismConfig cuts sequences or layers too; leave cp_size, sp_size and tp_size at 1"
    if trainer.accelerator.dispatch_batches or trainer.accelerator.split_batches:
        return "dispatch_batches and split_batches send parts of one batch to the ranks; leave both out of accelerator_config"
    return None


def _mesh(device: str, size: int) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("data", "sequence"))


def _by_replica(loader: DataLoader[Any], mesh: DeviceMesh) -> DataLoader[Any]:
    """accelerate has dealt batches out to all ranks; deal them out to replicas."""
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        dealt: Any = loader.batch_sampler
    elif isinstance(loader.dataset, IterableDatasetShard):
        dealt = loader.dataset
    else:
        raise InputError(
            f"the data loader is a {type(loader).__name__} that does not deal out batches to ranks; pass a dataset with a "
            "length, or an iterable one with accelerator_config={'dispatch_batches': False}"
        )
    dealt.num_processes, dealt.process_index = mesh["data"].size(), mesh["data"].get_local_rank()
    return loader
