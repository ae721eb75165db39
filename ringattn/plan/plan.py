"""Defines the plan of one attention: everything that does not depend on the tensors, decided once for all ranks.

A plan has the head groups of both passes (see `head_groups`), each rank's program and the messages between ranks. Plans are
immutable, equal on every rank for equal arguments, and cached; `attention` looks nothing up and decides nothing. `planner`
makes the choice; `planner.cost` predicts what a plan costs. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from ringattn.plan.head_groups import HeadGroup, pairs
from ringattn.schedule import Kind
from ringattn.schedule.program import Message, Step, messages, program
from ringattn.sequence.layout import Layout
from ringattn.sequence.mask import Mask


@dataclass(frozen=True, eq=False)
class Plan:
    """What `make_plan` returns. Frozen and hashable; two plans are equal exactly when their digests are.

    `str(plan)` is a description for people, `digest` identifies the plan among ranks. `forward` and `backward` may use
    different schedules.
    """

    seq_len: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    mask: Mask
    layout: Layout
    kernel: str
    forward: tuple[HeadGroup, ...]
    backward: tuple[HeadGroup, ...]
    partials: str = "auto"  # the dtype in which sums travel, see `rounds_on_wire`
    labels: tuple[str, str] = ("", "")  # names of forward and backward, for people
    notes: str = field(default="", repr=False)

    def rows(self, rank: int) -> int:
        """Number of queries that `rank` holds; also of keys, where these have the layout of the queries."""
        return self.layout.rows(rank)

    def kv_rows(self, rank: int) -> int:
        """Number of keys that `rank` holds."""
        return self.layout.of_keys.rows(rank)

    @property
    def kv_len(self) -> int:
        """Number of keys in the complete sequence."""
        return self.layout.of_keys.length

    @cached_property
    def balance(self) -> float:
        """Work of the busiest rank over the mean: 1.0 is perfect, `world` means that one rank does everything."""
        counts = pairs(self.forward)
        return max(counts.values()) * self.world / counts.total() if counts.total() else 1.0

    def pass_name(self, *, backward: bool) -> str:
        """The name of one pass, for errors, profiles and event logs."""
        name = self.labels[backward] or " | ".join(
            head_group.schedule.name for head_group in (self.backward if backward else self.forward)
        )
        return f"{'backward' if backward else 'forward'} ({name})"

    def rounds_on_wire(self, head_group: HeadGroup, kind: Kind) -> bool:
        """Whether sums of `kind` travel in the plan's dtype instead of the accumulation dtype.

        "auto" rounds results that go straight to their owner: these are rounded once, as the kernel's own result is. A result
        that accumulates on the way would be rounded at every hop, and the error would grow with the number of ranks.
        """
        return head_group.schedule.returns_to_owner(kind) if self.partials == "auto" else self.partials == "narrow"

    @property
    def reuse_inputs(self) -> bool:
        """Whether inputs stay on their resident ranks for backward: when both passes have the same head groups."""
        return self.forward is self.backward and any(head_group.schedule.has_residents for head_group in self.forward)

    def program(self, rank: int, *, backward: bool) -> tuple[Step, ...]:
        """The steps of `rank` in one pass."""
        key = (rank, backward)
        if key not in self._programs:
            schedules = [head_group.schedule for head_group in (self.backward if backward else self.forward)]
            sent = self.messages(backward=backward)
            self._programs[key] = program(schedules, sent, rank, reuse_inputs=self.reuse_inputs and not backward)
        return self._programs[key]

    def messages(self, *, backward: bool) -> tuple[Message, ...]:
        """The messages of all ranks in one pass, in the order that all ranks follow."""
        return self._messages[backward]

    @cached_property
    def _programs(self) -> dict[tuple[int, bool], tuple[Step, ...]]:
        return {}

    @cached_property
    def _messages(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        forward, backward = (
            [head_group.schedule for head_group in head_groups] for head_groups in (self.forward, self.backward)
        )
        return messages(forward, backward=False), messages(backward, backward=True, reuse_inputs=self.reuse_inputs)

    @cached_property
    def digest(self) -> str:
        """16 hex digits, equal exactly when two plans compute and send the same things in the same order."""
        passes = (self.forward, self.backward)
        head_groups = [
            [
                (head_group.heads, str(head_group.schedule), head_group.q_blocks, head_group.kv_blocks)
                for head_group in head_groups
            ]
            for head_groups in passes
        ]
        model = (self.heads, self.kv_heads, self.head_dim, self.dtype, self.kernel, self.partials)
        numbers = (self.reuse_inputs, self.seq_len, self.world, *model)
        return sha256(repr((numbers, self.mask, self.layout, head_groups)).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """The contents of the digest, by name, for ranks whose digests differ."""
        model = {name: getattr(self, name) for name in ("seq_len", "world", "heads", "kv_heads", "head_dim", "dtype")}
        chosen = {"mask": self.mask, "layout": self.layout, "kernel": self.kernel, "partials": self.partials}
        return model | chosen | {"schedule": "; ".join(self.pass_name(backward=b) for b in (False, True))}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        counts = [self.rows(rank) for rank in range(self.world)]
        rows = f"{min(counts)} to {max(counts)}" if max(counts) > min(counts) else f"{max(counts)}"
        keys = f" against {self.kv_len} keys" if self.layout.keys is not None else ""
        lines = [
            f"{self.seq_len} tokens{keys}, {self.heads} heads over {self.kv_heads} of {self.head_dim}, {self.dtype}, "
            f"{self.mask} mask",
            f"{self.world} ranks, {self.layout} layout, {rows} rows each, the busiest with {self.balance:.2f} x the mean work; "
            f"kernel {self.kernel}",
            f"{self.pass_name(backward=False)}; {self.pass_name(backward=True)}",
        ]
        return "\n".join([*lines, *([self.notes] if self.notes else []), f"digest {self.digest}"])
