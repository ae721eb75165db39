"""Adds sequence parallelism to the Hugging Face Trainer: sequences are sharded over some ranks, the others are replicas.

    class MyTrainer(SequenceParallel, Trainer): ...
    MyTrainer(model, args, train_dataset=dataset, sequence_parallel_size=2).train()

World rank = replica x sequence_parallel_size + index in the sequence group. Trainer and its subclasses process batches as
usual: their model takes whole batches and returns the loss and logits of one process, while attention runs on shards
(`forward_whole`). Only what depends on the number of ranks is corrected: which ranks get which batch, how many ranks average
gradients and count tokens, and from which ranks predictions are gathered.

accelerate has two sequence-parallel modes of its own and no third, so its `ParallelismConfig` stays empty. Under DeepSpeed the
loss depends on the ZeRO stage, see `deepspeed`; that is refused here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils import recursively_apply
from packaging import version
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from ringattn.comm.collectives import all_gather
from ringattn.errors import InputError
from ringattn.faults.watchdog import comm_errors
from ringattn.integrations.transformers.attention_interface import NAME, register
from ringattn.integrations.transformers.on_shards import OnShards
from ringattn.integrations.transformers.support.unsupported import without_interface
from ringattn.integrations.transformers.whole_batch import unwrap
from ringattn.nn.loss import IGNORE

__all__ = ["SequenceParallel"]

if TYPE_CHECKING:  # a mixin at run time, for any subclass of Trainer
    from transformers import Trainer as Base
else:
    Base = object

OLDEST = "5.23"  # of transformers: where this was tested
_TRAINER_LOSS = transformers.Trainer.compute_loss


class SequenceParallel(Base):
    """A mixin for `transformers.Trainer` and its subclasses; name it first. Needs a model of transformers.

    Args, in addition to the trainer's:
        sequence_parallel_size: ranks that share each sequence; divides the number of ranks.
        sharding: further keywords for `shard_batch`, such as schedule and layout.

    Raises:
        InputError: the number of ranks is not a multiple of the size, the job uses DeepSpeed or a sequence-parallel mode of
            accelerate, or an argument of the trainer is not supported on shards. Raised on every rank.

    An iterable dataset must yield the same batches on every rank. Losses,
    gradients, predictions and metrics are those of Trainer with as many processes as there are replicas. Functions that
    read logits (compute_metrics, compute_loss_func, label smoothing) get all, (batch, seq_len, vocab_size), on every rank.
    """

    def __init__(self, *args: Any, sequence_parallel_size: int, sharding: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        problem = _unsupported_job(self, sequence_parallel_size)
        if problem:
            raise InputError(problem)
        self.sharding = sharding or {}
        self.mesh = _mesh(self.args.device.type, sequence_parallel_size)
        self._sequence_mesh = self.mesh["sequence"]  # one object, since a compiled model is recompiled for another
        register()
        self.accelerator.unwrap_model(self.model).set_attn_implementation(NAME)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return _shard_by_replica(super().get_train_dataloader(), self.mesh)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return _shard_by_replica(super().get_eval_dataloader(eval_dataset), self.mesh)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return _shard_by_replica(super().get_test_dataloader(test_dataset), self.mesh)

    def get_tp_size(self) -> int:
        """The number of ranks with the same batch. Trainer divides by it for counts of batches and tokens and for gradients."""
        size: int = super().get_tp_size()
        return size * (self.mesh["sequence"].size() if hasattr(self, "mesh") else 1)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Counts the targets of a step without those on padding, which `shard_batch` excludes from the loss."""
        if self._loss_shifts_labels and not self.accelerator.unwrap_model(self.model).config.is_encoder_decoder:
            batch_samples = [_without_targets_on_padding(batch) for batch in batch_samples]
        items = super()._get_num_items_in_batch(batch_samples, device)
        if items is None or self.args.average_tokens_across_devices:
            return items
        return items * self.mesh["sequence"].size()  # Trainer also divides the count of a single rank

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        step: Tensor = super().training_step(self._on_shards(model), *args, **kwargs)
        return step

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(
            self._on_shards(model, prediction_loss_only), inputs, prediction_loss_only, *args, **kwargs
        )

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Calls the base trainer with a model on shards. inputs: a whole batch, the same on the ranks of a sequence."""
        if self._needs_labels() and not {"labels", "shift_labels", "start_positions"} & set(inputs):
            raise InputError(f"the batch has no labels, only {', '.join(inputs)}; use a data collator that adds them")
        return super().compute_loss(self._on_shards(model), inputs, return_outputs, num_items_in_batch)

    def _needs_labels(self) -> bool:
        """Whether the model computes the loss from labels."""
        base_compute_loss = super().compute_loss
        return getattr(base_compute_loss, "__func__", None) is _TRAINER_LOSS and self.compute_loss_func is None

    def _on_shards(self, model: Any, loss_only: bool = False) -> Any:
        if type(model) is OnShards:
            return model
        return OnShards(model, self._sequence_mesh, self.sharding, loss_only)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = partial(_gather_replicas, self)
        return super().evaluation_loop(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # sums over all ranks
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.mesh["sequence"].size()

    def floating_point_ops(self, inputs: Any) -> int:
        """This rank's share: Trainer sums over all ranks."""
        total: int = super().floating_point_ops(inputs)
        return total // self.mesh["sequence"].size()


def _unsupported_job(trainer: Any, size: int) -> str | None:
    """The reason why this job cannot shard its sequences, or None."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        return f"sequence_parallel_size={size} does not divide the {world} ranks of this job"
    if world == 1:
        return "there is one process and no process group: start the script with torchrun --nproc-per-node N"
    if trainer.is_deepspeed_enabled:
        return "this job runs under DeepSpeed, whose gradients depend on the ZeRO stage: see ringattn.integrations.deepspeed"
    model = unwrap(trainer.model)
    if without_interface(model):  # set_attn_implementation would only warn, and each rank would attend to its own rows
        return (
            f"the layers of {type(model).__name__} do not use transformers' attention interface, so ringattn cannot be their "
            "attention; use another model"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        return "accelerate's ParallelismConfig also shards sequences or layers; leave cp_size, sp_size and tp_size at 1"
    if trainer.accelerator.dispatch_batches or trainer.accelerator.split_batches:
        return "dispatch_batches and split_batches send parts of one batch to the ranks; leave both out of accelerator_config"
    return _unsupported_argument(trainer)


def _unsupported_argument(trainer: Any) -> str | None:
    """The reason why an argument of the trainer is not supported on shards, or None."""
    if trainer.neftune_noise_alpha is not None:
        return (
            f"neftune_noise_alpha={trainer.neftune_noise_alpha} makes noise whose size depends on the rows of one rank; leave "
            "it out, or add noise to inputs_embeds of the whole batch in a data collator"
        )
    if getattr(trainer.args, "predict_with_generate", False):
        return (
            "predict_with_generate generates, which needs a cache of whole sequences; leave it out, and evaluate generation in "
            "a job of its own, after model.set_attn_implementation('sdpa')"
        )
    if getattr(trainer.args, "eval_use_gather_object", False):
        return "eval_use_gather_object gathers from every rank, also those that share a sequence; leave it out"
    if version.parse(transformers.__version__) < version.parse(OLDEST):
        return (
            f"transformers {transformers.__version__} scales losses without regard to ranks that share a batch; install "
            f"transformers {OLDEST} or later"
        )
    return None


def _without_targets_on_padding(batch: Any) -> Any:
    labels, tokens = batch.get("labels"), batch.get("attention_mask")
    if labels is None or tokens is None or "shift_labels" in batch or tokens.shape != labels.shape:
        return batch
    counted = labels.clone()
    counted[:, 1:].masked_fill_(tokens[:, :-1] == 0, IGNORE)
    return {**batch, "labels": counted}


def _mesh(device: str, size: int) -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size() // size, size), mesh_dim_names=("data", "sequence"))


def _shard_by_replica(loader: DataLoader[Any], mesh: DeviceMesh) -> DataLoader[Any]:
    """Distributes batches to replicas, where accelerate distributed them to all ranks."""
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        sharded: Any = loader.batch_sampler
        # One replica needs no even batches: its last batch is as short as in one process.
        sharded.even_batches = sharded.even_batches and mesh["data"].size() > 1
    elif isinstance(loader.dataset, IterableDatasetShard):
        sharded = loader.dataset
    else:
        raise InputError(
            f"the data loader is a {type(loader).__name__} that does not distribute batches to ranks; pass a dataset with a "
            "length, or an iterable one with accelerator_config={'dispatch_batches': False}"
        )
    sharded.num_processes, sharded.process_index = mesh["data"].size(), mesh["data"].get_local_rank()
    return loader


def _gather_replicas(trainer: Any, data: Any) -> Any:
    """Gathers the predictions of all replicas in dataset order, without the padding of the last batch; collective."""
    data = recursively_apply(
        lambda tensor: _gather_and_concatenate(tensor, trainer.mesh["data"]), data, error_on_other_type=True
    )
    state = trainer.accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0:
        data = recursively_apply(lambda tensor: tensor[: state.remainder], data)
    return data


def _gather_and_concatenate(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    tensor = (tensor.unsqueeze(0) if tensor.ndim == 0 else tensor).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(mesh.size())]
    with comm_errors("gathering predictions", f"rank {dist.get_rank()}: predictions of the replicas could not be gathered"):
        all_gather(parts, tensor, mesh.get_group())
    return torch.cat(parts)
