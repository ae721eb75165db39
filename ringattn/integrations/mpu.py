"""Builds the process groups of a DeepSpeed job with sequence parallelism, in the form DeepSpeed expects: `mpu`.

World rank = replica x sequence_parallel_size + index in the sequence group, as in DeepSpeed's own
`deepspeed/runtime/sequence_parallel/parallel_state_sp.py`, whose functions this object has. It has two additions: number and
index of the replica, so that DeepSpeed can also make the data loader, and a model-parallel group of one rank, since parameters
are whole on every rank.

It has no `get_data_parallel_group`, on purpose: ZeRO 3 would shard parameters over that group and leave the ranks of a sequence
out when it reduces gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.comm.process_group import LAUNCH_HINT, device_type_of
from ringattn.errors import InputError, LaunchError


def sequence_parallel(size: int) -> SequenceParallel:
    """Builds the groups for sequences sharded over `size` ranks each; collective over the default group, which must exist.

    Raises:
        LaunchError: there is no process group.
        InputError: the number of ranks is not a multiple of `size`.
    """
    if not dist.is_initialized():
        raise LaunchError(f"call deepspeed.init_distributed() first; {LAUNCH_HINT}")
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise InputError(f"sequence_parallel_size={size} does not divide the {world} ranks of this job")
    default = dist.group.WORLD
    assert default is not None
    ranks = torch.arange(world).view(world // size, size, 1)
    return SequenceParallel(DeviceMesh(device_type_of(default), ranks, mesh_dim_names=("data", "sequence", "model")))


@dataclass(frozen=True)
class SequenceParallel:
    """The object for `deepspeed.initialize(mpu=...)`. mesh: (data, sequence, model), the last of size 1."""

    mesh: DeviceMesh

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """Checks the size; the groups exist. DeepSpeed recognises the kind of mpu by this method's name."""
        if sequence_parallel_size != self.get_sequence_parallel_world_size():
            raise InputError(
                f"sequence_parallel_size={sequence_parallel_size}, and these groups are for "
                f"{self.get_sequence_parallel_world_size()}; make others with sequence_parallel({sequence_parallel_size})"
            )

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("sequence")

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_sequence_parallel_group())

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self.get_sequence_parallel_group())

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        world = dist.group.WORLD
        assert world is not None
        return world

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        return int(self.mesh.size(0))

    def get_data_parallel_rank(self) -> int:
        return self.mesh.get_local_rank("data")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("model")

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
