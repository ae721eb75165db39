"""Counts the memory that one rank uses during a pass, event by event, in the order of the engine.

`peak_bytes` in `sizes` bounds what a schedule moves; this counts everything: messages, foreign blocks, results of kernels, up
to `MERGED_AT_ONCE` of which wait to be merged, and the tensors that the pass returns. Not counted are the kernel's own scratch
memory and, where merges are not fused, the temporaries of torch's operators. No torch here.
"""

from __future__ import annotations

from ringattn.plan.plan import Plan
from ringattn.planner.cost.sizes import ITEMSIZE, Sizes
from ringattn.schedule.ir import Kind
from ringattn.schedule.program import MERGED_AT_ONCE, Item, Message, Step, TileBatch


def pass_bytes(
    plan: Plan, rank: int, *, batch: int = 1, backward: bool = False, bias_heads: int = 0, surrogates: bool = True
) -> int:
    """The most bytes that one pass of `rank` uses at once, beyond its inputs and the tensors saved for backward.

    Args:
        surrogates: whether the kernel's backward needs out, of which foreign queries bring only delta (see `kernels.fused`).
    """
    counter = _MemoryCounter(plan, rank, batch, backward, bias_heads, surrogates and backward)
    for step in plan.program(rank, backward=backward):
        counter.step(step)
    return counter.end()


class _MemoryCounter:
    """Tracks the bytes held after each event. Blocks of inputs are held as the messages in which they arrived."""

    def __init__(self, plan: Plan, rank: int, batch: int, backward: bool, bias_heads: int, surrogates: bool) -> None:
        self.plan, self.rank, self.backward, self.batch = plan, rank, backward, batch
        self.sizes = Sizes(plan, batch=batch, backward=backward, bias_heads=bias_heads)
        self.surrogates = surrogates
        self.messages: dict[Message, int] = {}
        self.blocks: dict[Item, int] = {}
        self.shares: dict[Item, list[int]] = {}
        wide = max(4, ITEMSIZE[plan.dtype])
        self.statistics = (
            2 * wide * batch * plan.heads * plan.rows(rank) if backward else 0
        )  # delta, and lse in the kernels' layout
        self.peak = 0

    def step(self, step: Step) -> None:
        for message in step.arrival:
            del self.messages[message]
            for item in message.items if message.dst == self.rank else ():
                part = self.sizes.travelling(item)
                if item.kind.moved:
                    self.add(item, part)
                else:
                    self.blocks[item._replace(new=False)] = self.blocks.get(item._replace(new=False), 0) + part
            self.update_peak()
        for message in step.post:
            self.post(message)
        for tiles in step.tiles:
            self.compute(tiles)
        for item in step.release:
            self.blocks.pop(item, None)

    def post(self, message: Message) -> None:
        nbytes = sum(map(self.sizes.travelling, message.items))
        leaving = [self.shares.pop(item) for item in message.items if item.kind.moved and message.src == self.rank]
        # A block is forwarded as it arrived, and a single tensor is sent in place; several tensors are copied into one message.
        copied = message.dst == self.rank or not self._is_in_place(message)
        self.messages[message] = nbytes if copied or leaving else 0
        self.update_peak(sum(map(sum, leaving)) if copied else 0)

    def compute(self, tiles: TileBatch) -> None:
        head_group = self.sizes.head_groups[tiles.head_group]
        segments = head_group.segments(tiles)
        for kind, indices, start, stop in (
            (Kind.Q_ACC, tiles.i, "q_start", "q_stop"),
            (Kind.KV_ACC, tiles.j, "k_start", "k_stop"),
        ):
            if kind is Kind.KV_ACC and not self.backward:
                continue
            first = min((getattr(segment, start) for segment in segments), default=0)
            last = max((getattr(segment, stop) for segment in segments), default=0)
            begin = 0
            for index in indices:
                item, rows = Item(tiles.head_group, kind, index), head_group.block(kind, index).rows
                self.add(item, self.sizes.share(item, max(0, min(last, begin + rows) - max(first, begin))))
                begin += rows
        for index in tiles.i if self.surrogates else ():
            item = Item(tiles.head_group, Kind.Q, index)
            if head_group.block(Kind.Q, index).rank != self.rank and item in self.blocks:
                # A surrogate out, as large as dq.
                share = self.sizes.share(Item(tiles.head_group, Kind.Q_ACC, index), head_group.block(Kind.Q, index).rows)
                self.blocks[item] = max(self.blocks[item], self.sizes.travelling(item) + share)
        self.update_peak(self._joined(Kind.Q, tiles.head_group, tiles.i) + self._joined(Kind.KV, tiles.head_group, tiles.j))

    def _joined(self, kind: Kind, head_group: int, indices: tuple[int, ...]) -> int:
        """Bytes of the copy that joins several blocks for the kernel while it runs."""
        if len(indices) == 1:
            return 0
        return sum(self.sizes.travelling(Item(head_group, kind, index)) for index in indices)

    def end(self) -> int:
        """The peak, after the returned tensors have been made from the accumulators."""
        in_place = len(self.shares) == (2 if self.backward else 1) and all(len(parts) == 1 for parts in self.shares.values())
        rows, keys, dim = self.plan.rows(self.rank), self.plan.kv_rows(self.rank), self.plan.head_dim
        narrow, wide = ITEMSIZE[self.plan.dtype], max(4, ITEMSIZE[self.plan.dtype])
        returned = narrow * self.batch * rows * self.plan.heads * dim
        if self.backward:
            returned += 2 * narrow * self.batch * keys * self.plan.kv_heads * dim
        else:
            returned += wide * self.batch * rows * self.plan.heads
        self.update_peak(0 if in_place else returned)
        return self.peak

    def add(self, item: Item, nbytes: int) -> None:
        waiting = self.shares.setdefault(item, [])
        if len(waiting) == MERGED_AT_ONCE:
            self.update_peak(self.sizes.stored(item))
            waiting[:] = [self.sizes.stored(item)]
        waiting.append(nbytes)

    def update_peak(self, temporary: int = 0) -> None:
        buffers = (self.messages, self.blocks)
        total = sum(sum(sizes.values()) for sizes in buffers) + sum(map(sum, self.shares.values()))
        self.peak = max(self.peak, total + self.statistics + temporary)

    def _is_in_place(self, message: Message) -> bool:
        if len(message.items) > 1:
            return False
        (item,) = message.items
        if item in self.blocks or item._replace(new=False) in self.blocks:
            return True
        fields = len(self.sizes.fields(item))
        one_sequence = self.batch == 1 and len(self.sizes.head_groups) == 1
        return fields == 1 and (one_sequence or item.kind.moved)
