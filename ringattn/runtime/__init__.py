"""Running under torchrun: `init` makes the process group, `note` adds a line to this rank's journal."""

from ringattn.comm.journal import note
from ringattn.runtime.init import init

__all__ = ["init", "note"]
