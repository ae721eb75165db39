"""Moves bytes between ranks over torch.distributed, shared memory or within one process."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_MODULES = {
    "all_gather": "collectives",
    "all_reduce": "collectives",
    "agree": "consistency",
    "P2P": "p2p",
    "TRANSPORTS": "select",
    "choose": "select",
    "register": "select",
    "unregister": "select",
    "transport_for": "select",
    "SharedMemoryPort": "shared_memory",
    "Simulated": "simulated",
    "SimulatedPort": "simulated",
    "Port": "transport",
    "Transport": "transport",
    "Message": "transport",
}

__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"ringattn.comm.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ringattn.comm' has no attribute {name!r}")


if TYPE_CHECKING:
    from ringattn.comm.collectives import all_gather as all_gather
    from ringattn.comm.collectives import all_reduce as all_reduce
    from ringattn.comm.consistency import agree as agree
    from ringattn.comm.p2p import P2P as P2P
    from ringattn.comm.select import TRANSPORTS as TRANSPORTS
    from ringattn.comm.select import choose as choose
    from ringattn.comm.select import register as register
    from ringattn.comm.select import transport_for as transport_for
    from ringattn.comm.select import unregister as unregister
    from ringattn.comm.shared_memory import SharedMemoryPort as SharedMemoryPort
    from ringattn.comm.simulated import Simulated as Simulated
    from ringattn.comm.simulated import SimulatedPort as SimulatedPort
    from ringattn.comm.transport import Port as Port
    from ringattn.comm.transport import Transport as Transport
    from ringattn.schedule.program import Message as Message
