"""What each rank knows of its rows, told to all: whole numbers or flags, one for each row of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.arguments import complaint
from ringattn.callers import dense, meet
from ringattn.comm.agree import agree
from ringattn.comm.factory import transport_for
from ringattn.comm.group import Group, cannot_move
from ringattn.comm.rows import everyone
from ringattn.comm.transport import Transport
from ringattn.errors import InputError
from ringattn.layout import Layout
from ringattn.sharding import in_order


def tell(flags: Tensor, layout: Layout, group: Group | None = None) -> Tensor:
    """(batch, seq_len) on every rank, in the order of the sequence; collective. flags: bool or int64 (batch, rows).

    For policies that go by what rows hold: `segments(tell(tokens == SPACE, plan.layout))`.

    Raises:
        InputError: flags are not for the rows of this rank. Raised on every rank.
        MismatchError: ranks came with different dtypes or layouts. Raised on every rank.
    """
    return tell_as("flags", flags, (torch.bool, torch.int64), layout, group)


def tell_as(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, group: Group | None) -> Tensor:
    """`tell` for an argument that is called `name` where it comes from."""
    process_group, rank = meet(layout, group, Layout)
    said: dict[str, object] = {"call": "tell"}
    problem = complaint(lambda: _check(name, flags, dtypes, layout, rank)) or cannot_move(process_group, name, flags)
    if problem is None:
        said |= {"layout": layout.digest, f"dtype of {name}": flags.dtype, "batch": flags.shape[0]}
    agree(process_group, said, problem, device=flags.device if isinstance(flags, Tensor) else None)
    return told([flags], layout, transport_for(process_group))[0]


def _check(name: str, flags: Tensor, dtypes: tuple[torch.dtype, ...], layout: Layout, rank: int) -> None:
    if dense(name, flags).ndim != 2 or flags.shape[1] != layout.rows(rank) or flags.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{name}: {flags.dtype} of shape {tuple(flags.shape)}; give {kinds} (batch, rows) with the "
            f"{layout.rows(rank)} rows that the layout gives rank {rank}"
        )


def told(found: Sequence[Tensor], layout: Layout, transport: Transport) -> list[Tensor]:
    """(batch, rows, ...) of every rank as (batch, seq_len, ...), on each rank that `transport` hosts."""
    counts = [layout.rows(rank) for rank in range(layout.world)]
    parts = everyone([own.transpose(0, 1).contiguous() for own in found], counts, transport)
    order = in_order(layout).to(found[0].device)
    return [torch.cat(of_ranks)[order].transpose(0, 1).contiguous() for of_ranks in parts]
