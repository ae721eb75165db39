"""Running under torchrun: `init` makes the process group."""

from ringattn.runtime.init import init

__all__ = ["init"]
