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
    "Layout": "sequence",
    "Mask": "sequence",
    "Plan": "plan",
    "RingAttnError": "errors",
    "Schedule": "schedule",
    "Topology": "planner",
    "CheckpointError": "errors",
    "CommError": "errors",
    "InputError": "errors",
    "LaunchError": "errors",
    "MismatchError": "errors",
    "PlanError": "errors",
    "ScheduleError": "errors",
    "StalledError": "errors",
    "attention": "execution.attention",
    "causal": "sequence",
    "documents": "sequence",
    "full": "sequence",
    "init": "runtime",
    "load_topology": "planner",
    "make_plan": "planner",
    "positions": "execution",
    "prefix_lm": "sequence",
    "shard": "execution",
    "sliding_window": "sequence",
    "unshard": "execution",
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
    from ringattn.execution import positions as positions
    from ringattn.execution import shard as shard
    from ringattn.execution import unshard as unshard
    from ringattn.execution.attention import attention as attention
    from ringattn.plan import Plan as Plan
    from ringattn.planner import Topology as Topology
    from ringattn.planner import load_topology as load_topology
    from ringattn.planner import make_plan as make_plan
    from ringattn.runtime.init import init as init
    from ringattn.schedule import Schedule as Schedule
    from ringattn.sequence import Layout as Layout
    from ringattn.sequence import Mask as Mask
    from ringattn.sequence import causal as causal
    from ringattn.sequence import documents as documents
    from ringattn.sequence import full as full
    from ringattn.sequence import prefix_lm as prefix_lm
    from ringattn.sequence import sliding_window as sliding_window
