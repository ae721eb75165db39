"""Bipartite soft matching, on any number of sequences at once: who may merge, whom each is most like, and which pairs do.

    sides    every other row is in A, the rest in B; or, by energy, the rows most like all others, alternately in A and B
    best     for each row of A the most similar row of B, the first of them if several are
    chosen   the `remove` most similar pairs, the first of them if several are; or all above a threshold
    labels   a row of A that is chosen takes the name of its row of B

Bolya et al. 2022, https://arxiv.org/abs/2210.09461 (ToMe); energy: Tran et al. 2024, https://arxiv.org/abs/2405.16148 (PiToMe).
Similarities are whole numbers (see `units`), so all of this gives the same answer wherever and in whatever parts it is
computed. Rows are along the last dimension; pure functions, no communication.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp

import torch
from torch import Tensor

from ringattn.compress.units import NONE, SAME, similarity

NEITHER, A, B = 0, 1, 2
STEPS = 14  # bits to which similarity is rounded before its energy is looked up
ENERGY = 1 << 32  # one unit of energy: sums of 2^30 rows stay below 2^63


def alternate(index: Tensor, free: Tensor) -> Tensor:
    """Sides by the row's number in its window or sequence: even rows to A, odd ones to B. free: bool, who may merge."""
    return torch.where(index % 2 == 0, A, B).where(free, NEITHER)


def by_chance(numbers: Tensor, index: Tensor, free: Tensor, every: int = 2) -> Tensor:
    """Of every `every` rows in a row one, drawn by `numbers`, is in B and the rest in A; as tomesd does in two dimensions."""
    *lead, rows = free.shape
    cells = -(-rows // every)
    padded = torch.nn.functional.pad(numbers.where(free, -1.0), (0, cells * every - rows), value=-1.0)
    winner = padded.view(*lead, cells, every).argmax(-1, keepdim=True)
    chosen = torch.zeros(*lead, cells, every, dtype=torch.bool, device=free.device).scatter(-1, winner, True)
    return torch.where(chosen.view(*lead, cells * every)[..., :rows], B, A).where(free, NEITHER)


def by_energy(energy: Tensor, free: Tensor, pairs: Tensor) -> Tensor:
    """The 2 * `pairs` rows of most energy, alternately in A and B; all others stay as they are."""
    ranked = energy.where(free, NONE).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(ranked).scatter(-1, ranked, torch.arange(ranked.shape[-1], device=ranked.device).expand_as(ranked))
    return torch.where(place % 2 == 0, A, B).where(free & (place < 2 * pairs.unsqueeze(-1)), NEITHER)


def energies(similarities: Tensor, margin: float) -> Tensor:
    """PiToMe's energy of each pair: the similarity itself above the margin, exp(similarity - margin) - 1 below.

    similarities: from `units.similarity`. Returns int64, in parts of `ENERGY`.
    """
    table = _table(margin).to(similarities.device)
    return table[((similarities / SAME).clamp(-1, 1) * (1 << STEPS)).round().long() + (1 << STEPS)]


@lru_cache(maxsize=8)
def _table(margin: float) -> Tensor:
    """By similarity from -1 to 1: looked up and not computed, since exp has other last bits on other devices."""
    values = (n / (1 << STEPS) for n in range(-(1 << STEPS), (1 << STEPS) + 1))
    return torch.tensor([round((x if x >= margin else exp(x - margin) - 1) * ENERGY) for x in values])


def best(a: Tensor, b: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `a` its largest similarity to a row of `b`, int64, and where that is: the first such of `positions`.

    a, b: from `units`, (..., rows, dim); positions: int64, of the rows of b, below 0 for one that is not to be had.
    """
    found = similarity(a, b).masked_fill((positions < 0).unsqueeze(-2), float(NONE))
    most = found.amax(-1)
    where = positions.unsqueeze(-2).expand_as(found).where(found == most.unsqueeze(-1), torch.iinfo(torch.int64).max).amin(-1)
    return most.long(), where


def chosen(scores: Tensor, pairs: Tensor | None, threshold: float | None) -> Tensor:
    """bool: which rows of A merge. scores: int64, from `best`, `NONE` for rows that are not in A; pairs: how many at most."""
    taken = scores > NONE
    if threshold is not None:
        taken &= scores > int(threshold * SAME)
    if pairs is not None:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(scores.shape[-1], device=scores.device) < pairs.unsqueeze(-1)
        taken &= torch.zeros_like(taken).scatter(-1, ranked, first.expand_as(ranked))
    return taken
