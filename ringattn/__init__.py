"""ringattn: exact attention over sequences that are cut over ranks.

    plan = make_plan(seq_len, world=mesh, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    x = shard(x, plan)                      # this rank's rows
    out = attention(q, k, v, plan)          # exact, differentiable, still sharded

Importing this package does nothing and imports nothing heavy: names are looked up when first used, so that masks, layouts,
schedules and plans work on a machine without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Layout": "layout",
    "Mask": "mask",
    "Plan": "plan",
    "RingAttnError": "errors",
    "Schedule": "schedule",
    "Topology": "topology",
    "CheckpointError": "errors",
    "CommError": "errors",
    "InputError": "errors",
    "LaunchError": "errors",
    "MismatchError": "errors",
    "PlanError": "errors",
    "ScheduleError": "errors",
    "StalledError": "errors",
    "attention": "functional",
    "causal": "mask",
    "documents": "mask",
    "full": "mask",
    "init": "runtime",
    "load_topology": "topology",
    "make_plan": "planner",
    "positions": "sharding",
    "prefix_lm": "mask",
    "shard": "sharding",
    "sliding_window": "mask",
    "unshard": "sharding",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ringattn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ringattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from ringattn.errors import CheckpointError as CheckpointError
    from ringattn.errors import CommError as CommError
    from ringattn.errors import InputError as InputError
    from ringattn.errors import LaunchError as LaunchError
    from ringattn.errors import MismatchError as MismatchError
    from ringattn.errors import PlanError as PlanError
    from ringattn.errors import RingAttnError as RingAttnError
    from ringattn.errors import ScheduleError as ScheduleError
    from ringattn.errors import StalledError as StalledError
    from ringattn.functional import attention as attention
    from ringattn.layout import Layout as Layout
    from ringattn.mask import Mask as Mask
    from ringattn.mask import causal as causal
    from ringattn.mask import documents as documents
    from ringattn.mask import full as full
    from ringattn.mask import prefix_lm as prefix_lm
    from ringattn.mask import sliding_window as sliding_window
    from ringattn.plan import Plan as Plan
    from ringattn.planner import make_plan as make_plan
    from ringattn.runtime import init as init
    from ringattn.schedule import Schedule as Schedule
    from ringattn.sharding import positions as positions
    from ringattn.sharding import shard as shard
    from ringattn.sharding import unshard as unshard
    from ringattn.topology import Topology as Topology
    from ringattn.topology import load_topology as load_topology
