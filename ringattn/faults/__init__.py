"""Finds out which rank failed, stalled or ended while others wait for it, and records what each rank did."""

from ringattn.faults.event_log import begin, note
from ringattn.faults.watchdog import transferring, watch

__all__ = ["begin", "note", "transferring", "watch"]
