"""Tests the mesh schedule: proved on every grid of up to 16 ranks, pruned or not, with tight buffer limits."""

from itertools import product

import pytest

from ringattn import PlanError
from ringattn.schedule import check, prune
from ringattn.schedule.mesh import factors, mesh


@pytest.mark.parametrize("world", range(1, 17))
def test_mesh_is_correct_on_every_grid(world: int) -> None:
    below = {(i, j) for i in range(world) for j in range(i + 1)}
    near = {(i, j) for i, j in product(range(world), repeat=2) if i // 3 == j // 3}
    for a in factors(world, upto=world):
        schedule = mesh(world, a=a)
        assert check(schedule) == schedule.limits, "the buffer limits are tight"
        received = {kind: [0] * world for kind in ("Q", "KV")}
        for move in schedule.moves:
            if not move.kind.moved:
                received[move.kind.value][move.dst] += 1
        assert received == {"Q": [a - 1] * world, "KV": [world // a - 1] * world}
        for alive in (below, near):
            check(prune(schedule, alive), alive)


def test_mesh_by_default_is_as_square_as_possible() -> None:
    assert [mesh(w) == mesh(w, a=a) for w, a in ((1, 1), (4, 2), (7, 1), (8, 2), (12, 3), (16, 4))] == [True] * 6
    for wrong in (3, 0, -2):
        with pytest.raises(PlanError, match=f"a={wrong}"):
            mesh(8, a=wrong)
