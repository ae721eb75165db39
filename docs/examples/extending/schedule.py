"""Adds a schedule: in step s, ranks r and r ^ s exchange their keys and values; for numbers of ranks that are powers of two."""

from collections.abc import Iterator

from ringattn.schedule import BufferLimits, CatalogRequest, Kind, Move, Schedule, Tile, make, register


def pairwise(world: int) -> Schedule:
    """Every rank computes its own queries against the keys of one other rank in each step."""
    others = [(step, rank, rank ^ step) for step in range(1, world) for rank in range(world)]
    tiles = [Tile(step, rank, i=rank, j=rank ^ step) for step in range(world) for rank in range(world)]
    # Keys of rank `other` leave it while step - 1 is computed; their gradients go back while step + 1 is.
    keys = [Move(Kind.KV, other, src=other, dst=rank, depart=step - 1, arrival=step) for step, rank, other in others]
    grads = [Move(Kind.KV_ACC, other, src=rank, dst=other, depart=step + 1, arrival=step + 2) for step, rank, other in others]
    return make("pairwise", world, tiles, [*keys, *grads], BufferLimits(kv=2, kv_acc=3))


def variants(request: CatalogRequest) -> Iterator[tuple[str, tuple[Schedule, ...]]]:
    """What `make_plan(schedule="pairwise")` chooses from: nothing where ranks do not pair up."""
    if request.world & (request.world - 1) == 0:
        yield "", (pairwise(request.world),)


register("pairwise", variants, summary="KV between pairs of ranks, another partner in each step")
