"""Running under torchrun: `init` makes the process group, `note` adds a line to this rank's journal."""

from ringattn.faults.event_log import note
from ringattn.runtime.init import init

__all__ = ["init", "note"]
