"""Starts ranks under torchrun: `init` makes the process group, `note` adds an event to this rank's event log."""

from ringattn.faults.event_log import note
from ringattn.runtime.init import init

__all__ = ["init", "note"]
