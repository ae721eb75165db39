"""Random numbers by (seed, layer, position): the same on one device and on a thousand, whoever draws them and in which order.

A counter-based generator: the three numbers are mixed as in SplitMix64 (Steele et al. 2014,
https://doi.org/10.1145/2714064.2660195), in wrapping 64-bit arithmetic.
"""

from __future__ import annotations

from torch import Tensor


def uniform(positions: Tensor, seed: int, layer: int, stream: int = 0) -> Tensor:
    """fp64 in (0, 1), the shape of `positions` (int64). `stream`: another draw at the same place."""
    state = positions.long()
    for number in (seed, layer, stream):
        state = _mixed(state + _signed(0x9E3779B97F4A7C15 * (2 * number + 1)))
    return ((state >> 12) & ((1 << 52) - 1)).double().add(0.5) * 2.0**-52


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in: torch has no unsigned arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
