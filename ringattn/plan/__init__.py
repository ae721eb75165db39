"""Holds everything about one attention that does not depend on the tensors, decided once for all ranks. No torch."""

from ringattn.plan.head_groups import Block, HeadGroup, Heads, pairs
from ringattn.plan.kernel_names import KERNELS
from ringattn.plan.plan import Plan

__all__ = ["Block", "Heads", "KERNELS", "HeadGroup", "Plan", "pairs"]
