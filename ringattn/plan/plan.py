"""A plan: everything about one attention that does not depend on the tensors, decided once and then obeyed.

It is the lanes of both passes (see `head_groups`), each rank's program and the messages between them. Plans are immutable,
equal on every rank for equal arguments, and cached; `attention` looks nothing up and decides nothing. How the choice is made is
in `planner`; what a plan costs is in `cost`. No torch here.
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

    `str(plan)` describes it for people, `digest` identifies it among ranks. `forward` and `backward` may use different
    schedules.
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
    labels: tuple[str, str] = ("", "")  # what forward and backward are called, for people
    notes: str = field(default="", repr=False)

    def rows(self, rank: int) -> int:
        """Queries that `rank` holds; and keys, where they lie with the queries."""
        return self.layout.rows(rank)

    def kv_rows(self, rank: int) -> int:
        """Keys that `rank` holds."""
        return self.layout.of_keys.rows(rank)

    @property
    def kv_len(self) -> int:
        """Keys in the whole sequence."""
        return self.layout.of_keys.length

    @cached_property
    def balance(self) -> float:
        """How much more than the mean the busiest rank computes: 1.0 is perfect, `world` is one rank alone."""
        work = pairs(self.forward)
        return max(work.values()) * self.world / work.total() if work.total() else 1.0

    def pass_name(self, *, backward: bool) -> str:
        """One pass, in words: of errors, profiles and journals."""
        name = self.labels[backward] or " | ".join(
            head_group.schedule.name for head_group in (self.backward if backward else self.forward)
        )
        return f"{'backward' if backward else 'forward'} ({name})"

    def rounds_on_wire(self, head_group: HeadGroup, kind: Kind) -> bool:
        """Whether sums of `kind` travel in the plan's dtype instead of the one they are kept in.

        "auto" rounds what is rounded once, as the kernel's own result is: on the straight way home. What gathers on its way
        would be rounded at every hop, and the error would grow with the number of ranks.
        """
        return head_group.schedule.returns_to_owner(kind) if self.partials == "auto" else self.partials == "narrow"

    @property
    def reuse_inputs(self) -> bool:
        """Whether inputs that rest away from home stay there for backward: when it has the same lanes."""
        return self.forward is self.backward and any(head_group.schedule.has_residents for head_group in self.forward)

    def program(self, rank: int, *, backward: bool) -> tuple[Step, ...]:
        """What `rank` does in one pass."""
        key = (rank, backward)
        if key not in self._programs:
            schedules = [head_group.schedule for head_group in (self.backward if backward else self.forward)]
            sent = self.messages(backward=backward)
            self._programs[key] = program(schedules, sent, rank, reuse_inputs=self.reuse_inputs and not backward)
        return self._programs[key]

    def messages(self, *, backward: bool) -> tuple[Message, ...]:
        """Everything that any rank sends in one pass, in the one order that all ranks keep to."""
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
        """16 hex digits that agree exactly when two plans do the same thing in the same way."""
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
        """What the digest stands for, by name: for ranks that find theirs to differ."""
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
