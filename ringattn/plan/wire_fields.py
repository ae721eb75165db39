"""What each kind of thing consists of, in each pass. One table: `work` makes tensors of it, `cost` counts its bytes.

            Q                        KV              Q_ACC            KV_ACC
forward     q                        k, v (, bias)   out, lse         nothing
backward    q, dout, lse, delta      k, v (, bias)   dq               dk, dv (, dbias)

Of inputs that have stayed since forward where they are needed only what is new comes: dout, lse and delta of Q, nothing of KV.
delta = sum(dout * out) travels in place of out, one number instead of head_dim of them (see `kernels.fused`).

Sums are kept in fp32 (fp64 for fp64). On the wire an accumulator that goes straight home travels in the dtype of q: rounded
once, which the kernel's own result already was. One that gathers on its way stays wide, because rounding it at every hop would
let the error grow with the number of ranks. A plan may say otherwise (`Plan.rounds`). Row statistics and biases are always
wide. No torch here.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from ringattn.schedule.ir import Kind


class Field(NamedTuple):
    """One tensor of a payload: (batch, heads, rows, dim), or (batch, heads, rows) when `dim` is None."""

    name: str
    heads: Literal["q", "kv", "bias"]  # as many as queries have, as keys have, or as the bias has (perhaps one for all)
    dim: Literal["qk", "v"] | None
    wide: bool = False  # in the accumulation dtype wherever it is


_Q, _DOUT, _OUT, _DQ = Field("q", "q", "qk"), Field("dout", "q", "v"), Field("out", "q", "v"), Field("dq", "q", "qk")
_K, _V, _DK, _DV = Field("k", "kv", "qk"), Field("v", "kv", "v"), Field("dk", "kv", "qk"), Field("dv", "kv", "v")
_LSE, _DELTA = Field("lse", "q", None, wide=True), Field("delta", "q", None, wide=True)
_BIAS, _DBIAS = Field("bias", "bias", None, wide=True), Field("dbias", "bias", None, wide=True)

_FORWARD = {Kind.Q: (_Q,), Kind.KV: (_K, _V, _BIAS), Kind.Q_ACC: (_OUT, _LSE), Kind.KV_ACC: ()}
_BACKWARD = {
    Kind.Q: (_Q, _DOUT, _LSE, _DELTA),
    Kind.KV: (_K, _V, _BIAS),
    Kind.Q_ACC: (_DQ,),
    Kind.KV_ACC: (_DK, _DV, _DBIAS),
}


@cache
def fields(kind: Kind, *, backward: bool, bias: bool, new: bool = False) -> tuple[Field, ...]:
    """What `kind` consists of, in the order it is handled; with `new`, only what backward adds to what forward had."""
    every = (_BACKWARD if backward else _FORWARD)[kind]
    if new:
        every = every[len(_FORWARD[kind]) :]
    return every if bias else tuple(field for field in every if field.heads != "bias")
