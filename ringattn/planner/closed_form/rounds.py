"""What one rank does, step by step, as short runs of equal steps: the schedules of `schedule` without the ranks.

`line` is everything along one axis: rings (KV visits) and TokenRing (Q visits), hop or direct. `grid` is the mesh. Departures
and due steps are those of `schedule.moves` and `schedule.mesh`, so bytes, order and buffers are too. A run ends where the
shift that a step makes begins to load the links differently (`Links.changes`), so there are few of them: a handful on a
switch or in nodes, one for each step only around a physical ring.

Bytes of what travels, from the one table in `payload`, for the heads that a rank works on.

Ulysses deals the heads out: `Model.shares` is what the busiest rank of a group gets, at least one head of KV. An `Exchange` is
what its all-to-all carries there and back. No schedule and no topology is known here.
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
    """Every rank sends `nbytes` to the rank `offset` further along `axis`, and takes in as much `lag` steps later.

    From step to step of a round the offset grows by `slope`; what the shift loads the links with does not change. `added` are
    bytes of sums that what arrives is added to.
    """

    axis: Axis
    offset: int
    nbytes: int
    lag: int
    slope: int = 0
    added: int = 0


class Round(NamedTuple):
    """`count` equal steps: what each posts, how many tiles it computes, bytes of foreign inputs and partials it holds."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    tiles: int
    posts: tuple[Post, ...] = ()
    held: int = 0


class Visitor(NamedTuple):
    """Bytes of a block that visits other ranks: as it goes out, as its result comes home, as that result is held."""

    out: int
    owner: int
    partial: int

    @property
    def both(self) -> int:
        """What a rank holds for a visitor it works on."""
        return self.out + self.partial


class TravelMode(NamedTuple):
    """How visitors travel. `ahead`: steps in flight. `accumulates`: the result follows the block, adding up on the way."""

    direct: bool = False
    ahead: int = 1
    accumulates: bool = False


HeadGroup = tuple[Visitor, int]  # and the direction it turns in


def line(axis: Axis, head_groups: Sequence[HeadGroup], way: TravelMode, links: Links) -> Iterator[Round]:
    """Along one axis: the visitors of all lanes at once."""
    size, held = axis.size, sum(visitor.both for visitor, _ in head_groups)
    edges = {0, 1, 2, size - 1, size, size + 1, size - way.ahead}
    if way.direct:
        edges |= {offset - way.ahead for offset in links.changes(axis)}
    if not way.accumulates:
        edges |= {size - offset + 2 for offset in links.changes(axis)}
    for step, end in pairwise(sorted(edge for edge in edges if 0 <= edge <= size + 1)):
        posts = [post for visitor, turn in head_groups for post in _posts(axis, visitor, turn, way, step)]
        yield Round(end - step, step < size, _combined(posts), held if 0 < step < size else 0)


def line_link_bytes(size: int, head_groups: Sequence[HeadGroup], way: TravelMode) -> int:
    """On the busiest directed link: the next rank's gets every hop, and each link one result straight home."""
    if size == 1:
        return 0
    hops = size - 1
    each = [(1 if way.direct else hops) * v.out + (hops if way.accumulates else 1) * v.owner for v, _ in head_groups]
    return sum(each) if size == 2 else max(each)  # of two ranks both neighbours are the same one


def _posts(axis: Axis, visitor: Visitor, turn: int, way: TravelMode, step: int) -> Iterator[Post]:
    last = axis.size - 1
    if not way.direct and step < last:
        yield Post(axis, turn, visitor.out, 1)
    if way.direct and step == 0:
        yield from (Post(axis, turn * n, visitor.out, n) for n in range(1, min(way.ahead, last) + 1))
    elif way.direct and step + way.ahead <= last:
        yield Post(axis, turn * (step + way.ahead), visitor.out, way.ahead, turn)
    if visitor.owner and 2 <= step <= axis.size:
        straight = Post(axis, -turn * (step - 1), visitor.owner, way.ahead, -turn, visitor.partial)
        yield Post(axis, turn, visitor.owner, 1, 0, visitor.partial) if way.accumulates else straight


def _combined(posts: Sequence[Post]) -> tuple[Post, ...]:
    """What has the same way and the same due step shares a message."""
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
    yield Round(1, 1, (hop_kv, hop_q))  # first visit: KV gathers
    yield Round(b - 2, 1, (hop_kv,), (b - 2) * kv.both)
    yield Round(1, 1, (), (b - 1) * kv.both)
    kept = q.both + (b - 1) * kv.both
    edges = {1, 2, a - 1, *(a - offset + 2 for offset in links.changes(rows))}
    for visit, end in pairwise(sorted(edge for edge in edges if 1 <= edge <= a - 1)):
        owner = (Post(rows, 1 - visit, q.owner, 1, -1, q.partial),) if visit > 1 else ()
        yield Round(end - visit, b, (hop_q._replace(lag=1), *owner), kept)
    yield Round(
        1, 1, (Post(rows, 2 - a, q.owner, b, 0, q.partial),) if a > 2 else (), kept
    )  # last visit: gradients of KV leave
    edges = {1, 2, b, *(b - offset + 1 for offset in links.changes(columns))}
    for step, end in pairwise(sorted(edge for edge in edges if 1 <= edge <= b)):
        owner = (Post(columns, -step, kv.owner, 2, -1, kv.partial),) if kv.owner else ()
        yield Round(end - step, 1, owner, q.both + (b - 1 - step) * kv.both)
    yield Round(1, 0, (Post(rows, 1 - a, q.owner, 1, 0, q.partial),))


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
        """Of the busiest rank in a group of `ulysses`, for each of its `head_groups`."""
        dealt = [
            replace(self, heads=sum(part.of_queries for part in parts), kv_heads=sum(part.of_keys for part in parts))
            for parts in share_heads(self.heads, self.kv_heads, ulysses * head_groups)
        ]
        members = [tuple(dealt[first : first + head_groups]) for first in range(0, len(dealt), head_groups)]
        return max(members, key=lambda member: sum(share.heads + share.kv_heads for share in member))

    def row(self, fields_: Iterable[Field], *, wide: bool = False) -> int:
        """Bytes of one row of `fields_`. `wide`: sums as they are kept, not as they travel once rounded."""
        narrow, broad = ITEMSIZE[self.dtype], max(4, ITEMSIZE[self.dtype])
        heads = {"q": self.heads, "kv": self.kv_heads}
        return self.batch * sum(
            heads[field.heads] * (broad if field.wide or wide else narrow) * (self.head_dim if field.dim else 1)
            for field in fields_
        )

    def visitor(self, kind: Kind, rows: int, *, backward: bool, accumulates: bool = False) -> Visitor:
        """A block of `rows` rows of `kind` as it visits; what rides gathers on its way, and so stays wide."""
        there = fields(kind, backward=backward, bias=False)
        back = fields(RESULT[kind], backward=backward, bias=False)
        return Visitor(rows * self.row(there), rows * self.row(back, wide=accumulates), rows * self.row(back, wide=True))


@dataclass(frozen=True)
class Exchange:
    """Bytes that each rank of a Ulysses group sends to each other one, before and after, and what it holds of it in between."""

    there: int
    back: dict[Kind, int]  # results of queries, and of keys and values
    inputs: int
    results: int

    @staticmethod
    def of(shares: Sequence[Model], ulysses: int, rows: int, *, backward: bool, wide: bool) -> Exchange:
        """q, k, v there and out, lse back; in backward q, k, v are kept from forward: dout, lse, delta there, dq, dk, dv back.

        `wide`: dk and dv have gathered on their way, and stay as they are on the last leg home.
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
