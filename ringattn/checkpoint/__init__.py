"""Saves and loads checkpoints of replicated training state, complete or absent, at once or while training continues."""

from ringattn.checkpoint.async_save import Saver
from ringattn.checkpoint.store import damage, latest, load, resume, save

__all__ = ["Saver", "damage", "latest", "load", "resume", "save"]
