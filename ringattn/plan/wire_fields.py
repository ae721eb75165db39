"""Lists the tensors of each kind of item in each pass: `blocks` builds messages from this table, `cost` counts its bytes.

            Q                        KV              Q_ACC            KV_ACC
forward     q                        k, v (, bias)   out, lse         nothing
backward    q, dout, lse, delta      k, v (, bias)   dq               dk, dv (, dbias)

Of inputs that have stayed on their resident rank since forward, only new fields are sent: dout, lse and delta of Q, no KV.
delta = sum(dout * out) travels in place of out, one number instead of head_dim of them (see `kernels.fused`).

Sums are accumulated in fp32 (fp64 for fp64). An accumulator that goes straight to its owner travels in the dtype of q: rounded
once, as the kernel's own result already was. One that accumulates on the way stays wide, because rounding it at every hop would
let the error grow with the number of ranks. A plan may decide otherwise (`Plan.rounds_on_wire`). Row statistics and biases are
always wide. No torch here.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from ringattn.schedule.ir import Kind


class Field(NamedTuple):
    """One tensor of a payload: (batch, heads, rows, dim), or (batch, heads, rows) when `dim` is None."""

    name: str
    heads: Literal["q", "kv", "bias"]  # as many as queries, keys or the bias have (a bias may have one for all)
    dim: Literal["qk", "v"] | None
    wide: bool = False  # always in the accumulation dtype


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
    """The tensors of `kind`, in wire order; with `new`, only those that backward adds to those of forward."""
    tensors = (_BACKWARD if backward else _FORWARD)[kind]
    if new:
        tensors = tensors[len(_FORWARD[kind]) :]
    return tensors if bias else tuple(field for field in tensors if field.heads != "bias")
