"""Defines schedules as data, and their readers: check, draw, transforms, program. Pure Python, no torch."""

from ringattn.schedule.catalog import NAMES, CatalogRequest, register, unregister
from ringattn.schedule.check import check, peak
from ringattn.schedule.interleave import take_turns
from ringattn.schedule.ir import BufferLimits, Kind, Move, Schedule, Tile, make, parse
from ringattn.schedule.mesh import mesh
from ringattn.schedule.program import Message
from ringattn.schedule.ring import bidirectional_ring, ring
from ringattn.schedule.token_ring import accumulating_ring, token_ring
from ringattn.schedule.transforms import both_ways, divide, prune, side_by_side, split
from ringattn.schedule.ulysses import ulysses

__all__ = [
    "NAMES",
    "CatalogRequest",
    "Kind",
    "Message",
    "Move",
    "BufferLimits",
    "Schedule",
    "Tile",
    "accumulating_ring",
    "bidirectional_ring",
    "both_ways",
    "check",
    "divide",
    "make",
    "mesh",
    "parse",
    "peak",
    "prune",
    "register",
    "ring",
    "side_by_side",
    "split",
    "take_turns",
    "token_ring",
    "ulysses",
    "unregister",
]
