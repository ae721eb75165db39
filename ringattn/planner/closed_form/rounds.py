"""Lists what one rank does as short runs of equal steps: the schedules of `schedule`, independent of the number of ranks.

`line` is a pass along one axis: rings (KV visits) and TokenRing (Q visits), hop or direct. `grid` is the mesh. Departure and
arrival steps are those of `schedule.moves` and `schedule.mesh`, and so are bytes, order and buffers. A run ends where the shift
that a step makes begins to load the links differently (`Links.changes`), so there are few runs: a handful on a switch or in
nodes, one for each step only around a physical ring.

`Model` computes the bytes of blocks from the table in `wire_fields`, for the heads of one rank. With Ulysses, `Model.shares`
are the heads of the busiest rank of a group, at least one KV head, and `Exchange` has the bytes of its all-to-all, there and
back. No schedule and no topology is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ringattn.plan.head_groups import share_heads
from ringattn.plan.wire_fields import Field, fields
from ringattn.planner.closed_form.shifts import Axis, Links
from ringattn.planner.cost import ITEMSIZE
from ringattn.schedule.ir import Kind


class Post(NamedTuple):
    """Every rank sends `nbytes` to the rank `offset` further along `axis`, and receives as much `lag` steps later.

    From step to step of a round the offset grows by `slope`, while the load on the links stays the same. `added` are the bytes
    of sums that the arrivals are added to.
    """

    axis: Axis
    offset: int
    nbytes: int
    lag: int
    slope: int = 0
    added: int = 0


class Round(NamedTuple):
    """`count` equal steps: the posts of each, the tiles it computes, bytes of foreign inputs and partial results."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used here
    tiles: int
    posts: tuple[Post, ...] = ()
    buffer_bytes: int = 0


class Visitor(NamedTuple):
    """Bytes of a block that visits other ranks: as sent out, its result as sent back, and its result as held."""

    out: int
    back: int
    partial: int

    @property
    def both(self) -> int:
        """Bytes that a rank holds for a visitor while computing its tiles."""
        return self.out + self.partial


class TravelMode(NamedTuple):
    """How visitors travel. `ahead`: steps in flight. `accumulates`: the result follows the block, adding up on the mode."""

    direct: bool = False
    ahead: int = 1
    accumulates: bool = False


HeadGroup = tuple[Visitor, int]  # and its direction around the ring


def line(axis: Axis, head_groups: Sequence[HeadGroup], mode: TravelMode, links: Links) -> Iterator[Round]:
    """The rounds along one axis, for the visitors of all head groups at once."""
    size, buffer_bytes = axis.size, sum(visitor.both for visitor, _ in head_groups)
    edges = {0, 1, 2, size - 1, size, size + 1, size - mode.ahead}
    if mode.direct:
        edges |= {offset - mode.ahead for offset in links.changes(axis)}
    if not mode.accumulates:
        edges |= {size - offset + 2 for offset in links.changes(axis)}
    for step, end in pairwise(sorted(edge for edge in edges if 0 <= edge <= size + 1)):
        posts = [post for visitor, turn in head_groups for post in _posts(axis, visitor, turn, mode, step)]
        yield Round(end - step, step < size, _combined(posts), buffer_bytes if 0 < step < size else 0)


def line_link_bytes(size: int, head_groups: Sequence[HeadGroup], mode: TravelMode) -> int:
    """Bytes on the busiest directed link: that to the next rank carries every hop, and each link one result straight back."""
    if size == 1:
        return 0
    hops = size - 1
    each = [(1 if mode.direct else hops) * v.out + (hops if mode.accumulates else 1) * v.back for v, _ in head_groups]
    return sum(each) if size == 2 else max(each)  # with two ranks both neighbours are the same


def _posts(axis: Axis, visitor: Visitor, turn: int, mode: TravelMode, step: int) -> Iterator[Post]:
    last = axis.size - 1
    if not mode.direct and step < last:
        yield Post(axis, turn, visitor.out, 1)
    if mode.direct and step == 0:
        yield from (Post(axis, turn * n, visitor.out, n) for n in range(1, min(mode.ahead, last) + 1))
    elif mode.direct and step + mode.ahead <= last:
        yield Post(axis, turn * (step + mode.ahead), visitor.out, mode.ahead, turn)
    if visitor.back and 2 <= step <= axis.size:
        straight = Post(axis, -turn * (step - 1), visitor.back, mode.ahead, -turn, visitor.partial)
        yield Post(axis, turn, visitor.back, 1, 0, visitor.partial) if mode.accumulates else straight


def _combined(posts: Sequence[Post]) -> tuple[Post, ...]:
    """Joins posts with the same route and arrival step into one message."""
    sizes: Counter[Post] = Counter()
    sums: Counter[Post] = Counter()
    for post in posts:
        key = post._replace(offset=post.offset % post.axis.size, nbytes=0, added=0)
        sizes[key] += post.nbytes
        sums[key] += post.added
    return tuple(key._replace(nbytes=sizes[key], added=sums[key]) for key in sizes)


def grid(rows: Axis, columns: Axis, q: Visitor, kv: Visitor, links: Links) -> Iterator[Round]:
    """Q along rows of `rows.size` >= 2 ranks, KV along columns of `columns.size` >= 2; see `schedule.mesh`."""
    a, b = rows.size, columns.size
    hop_q, hop_kv = Post(rows, 1, q.out, b), Post(columns, 1, kv.out, 1)
    yield Round(1, 1, (hop_kv, hop_q))  # first visit: KV arrives
    yield Round(b - 2, 1, (hop_kv,), (b - 2) * kv.both)
    yield Round(1, 1, (), (b - 1) * kv.both)
    buffer_bytes = q.both + (b - 1) * kv.both
    edges = {1, 2, a - 1, *(a - offset + 2 for offset in links.changes(rows))}
    for visit, end in pairwise(sorted(edge for edge in edges if 1 <= edge <= a - 1)):
        back = (Post(rows, 1 - visit, q.back, 1, -1, q.partial),) if visit > 1 else ()
        yield Round(end - visit, b, (hop_q._replace(lag=1), *back), buffer_bytes)
    # Last visit: gradients of KV leave.
    yield Round(1, 1, (Post(rows, 2 - a, q.back, b, 0, q.partial),) if a > 2 else (), buffer_bytes)
    edges = {1, 2, b, *(b - offset + 1 for offset in links.changes(columns))}
    for step, end in pairwise(sorted(edge for edge in edges if 1 <= edge <= b)):
        back = (Post(columns, -step, kv.back, 2, -1, kv.partial),) if kv.back else ()
        yield Round(end - step, 1, back, q.both + (b - 1 - step) * kv.both)
    yield Round(1, 0, (Post(rows, 1 - a, q.back, 1, 0, q.partial),))


RESULT = {Kind.Q: Kind.Q_ACC, Kind.KV: Kind.KV_ACC}


@dataclass(frozen=True)
class Model:
    """The heads one rank works on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    batch: int

    def shares(self, ulysses: int, head_groups: int = 1) -> tuple[Model, ...]:
        """The heads of the busiest rank in a group of `ulysses`, for each of its `head_groups`."""
        shares = [
            replace(self, heads=sum(part.of_queries for part in parts), kv_heads=sum(part.of_keys for part in parts))
            for parts in share_heads(self.heads, self.kv_heads, ulysses * head_groups)
        ]
        members = [tuple(shares[first : first + head_groups]) for first in range(0, len(shares), head_groups)]
        return max(members, key=lambda member: sum(share.heads + share.kv_heads for share in member))

    def row(self, tensors: Iterable[Field], *, wide: bool = False) -> int:
        """Bytes of one row of `tensors`. `wide`: sums in the accumulation dtype, not as rounded for a message."""
        narrow, broad = ITEMSIZE[self.dtype], max(4, ITEMSIZE[self.dtype])
        heads = {"q": self.heads, "kv": self.kv_heads}
        return self.batch * sum(
            heads[field.heads] * (broad if field.wide or wide else narrow) * (self.head_dim if field.dim else 1)
            for field in tensors
        )

    def visitor(self, kind: Kind, rows: int, *, backward: bool, accumulates: bool = False) -> Visitor:
        """The bytes of a visiting block of `rows` rows; a result that `accumulates` on the way stays wide."""
        there = fields(kind, backward=backward, bias=False)
        back = fields(RESULT[kind], backward=backward, bias=False)
        return Visitor(rows * self.row(there), rows * self.row(back, wide=accumulates), rows * self.row(back, wide=True))


@dataclass(frozen=True)
class Exchange:
    """Bytes that each rank of a Ulysses group sends to each other one, before and after, and holds in between."""

    there: int
    back: dict[Kind, int]  # results of queries, and of keys and values
    inputs: int
    results: int

    @staticmethod
    def of(shares: Sequence[Model], ulysses: int, rows: int, *, backward: bool, wide: bool) -> Exchange:
        """Forward: q, k, v there; out, lse back. Backward: dout, lse, delta there (q, k, v are still there); dq, dk, dv back.

        `wide`: dk and dv have accumulated on the way, and stay wide for the last move to the owner.
        """
        if ulysses == 1:
            return Exchange(0, {Kind.Q: 0, Kind.KV: 0}, 0, 0)
        q, kv = fields(Kind.Q, backward=backward, bias=False), fields(Kind.KV, backward=backward, bias=False)
        result, kv_result = (fields(RESULT[kind], backward=backward, bias=False) for kind in (Kind.Q, Kind.KV))
        there = fields(Kind.Q, backward=True, bias=False, new=True) if backward else (*q, *kv)
        return Exchange(
            there=rows * sum(share.row(there) for share in shares),
            back={
                Kind.Q: rows * sum(share.row(result) for share in shares),
                Kind.KV: rows * sum(share.row(kv_result, wide=wide) for share in shares),
            },
            inputs=rows * sum(share.row((*q, *kv)) for share in shares),
            results=rows * sum(share.row((*result, *kv_result), wide=True) for share in shares),
        )
