"""What a peer is: another library's attention over a sequence cut over ranks, behind one shape.

A `Setting` is one question, a `Peer` one way to answer it: whether it can, how it wants the sequence cut, and a differentiable
function of this rank's q, k and v. Nothing is timed or compared here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from ringattn.sequence import LAYOUTS, Layout

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """`rows` on each of `world` ranks. `flops`: an emulated accelerator's flop/s; 0 computes for real."""

    world: int
    rank: int
    rows: int
    heads: int
    kv_heads: int
    causal: bool
    dtype: str = "bfloat16"
    flops: float = 0.0

    @property
    def seq_len(self) -> int:
        return self.world * self.rows


@dataclass(frozen=True)
class Peer:
    """One variant of one library.

    `needs` is the module it comes in, `demands` says why it cannot run a setting, or None. `build` is called by all ranks, in
    the same order; what it returns takes (batch, rows, heads, head_dim) and (batch, rows, kv_heads, head_dim) twice.
    """

    name: str
    needs: str
    layout: Callable[[Setting], Layout]
    demands: Callable[[Setting], str | None]
    build: Callable[[Setting], Attention]

    def supports(self, setting: Setting) -> str | None:
        """None where it can run; else the reason why not."""
        if find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install 'ringattn[bench]'"
        return self.demands(setting)


def cut(name: str) -> Callable[[Setting], Layout]:
    """One of ringattn's layouts, by name."""
    return lambda setting: LAYOUTS[name](setting.seq_len, setting.world)


def anything(setting: Setting) -> str | None:
    return None


def two_halves(setting: Setting) -> str | None:
    """What zigzag asks for."""
    return f"{setting.rows} rows per rank are not two halves" if setting.rows % 2 else None


def only_causal(setting: Setting) -> str | None:
    return None if setting.causal else "balances a causal mask; without one it is the plain ring"


def sixteen_bits(setting: Setting) -> str | None:
    """What flash-attn asks for, and libraries made around it take for granted."""
    return None if setting.dtype in ("bfloat16", "float16") else f"{setting.dtype}: right in bfloat16 and float16 only"
