"""Checkpoints of replicated training state that are whole or not there, written at once or while training goes on."""

from ringattn.checkpoint.async_save import Saver
from ringattn.checkpoint.store import damage, latest, load, resume, save

__all__ = ["Saver", "damage", "latest", "load", "resume", "save"]
