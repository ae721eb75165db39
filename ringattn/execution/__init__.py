"""Carries out a plan: attention and its derivative over all shards; shards sequences; measures how much transfer is hidden."""

from ringattn.execution.autograd import Inputs, attend, run_backward, run_forward
from ringattn.execution.overlap import Overlap, overlap
from ringattn.execution.sharding import positions, shard, unshard

__all__ = ["Inputs", "Overlap", "attend", "overlap", "positions", "run_backward", "run_forward", "shard", "unshard"]
