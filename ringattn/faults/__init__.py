"""Finds out which rank failed, stalled or ended while others wait for it, and records what each rank did."""

from ringattn.faults.event_log import begin, note
from ringattn.faults.watchdog import comm_errors, watch

__all__ = ["begin", "note", "comm_errors", "watch"]
