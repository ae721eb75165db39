"""What a kernel is: attention of one block of queries to one block of keys on one device, over a list of pieces.

    forward(q, k, v, bias, pieces, options)                      -> Partial(out, lse)
    backward(q, k, v, bias, dout, lse, delta, pieces, options)   -> Grads(dq, dk, dv, dbias)

q, dout: (batch, heads, rows, head_dim); k, v: (batch, kv_heads, keys, head_dim); heads is a multiple of kv_heads.
bias: (batch, kv_heads or 1, keys), added to the scaled logits, or None. lse, delta: (batch, heads, rows).
In backward lse belongs to the whole row, not to this block, and is +inf for rows that see no key at all, so that their
probabilities come out as exactly 0; delta = sum(dout * out) of the whole row. That is all a block needs to get its exact share.

A kernel knows neither ranks nor masks nor schedules. Subclasses compute one piece; this module walks the list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.mask import Band
from ringattn.partial import Partial, accum_dtype, merge_, nothing
from ringattn.pieces import Piece


class Options(NamedTuple):
    """What changes the logits, the same for every tile."""

    scale: float
    softcap: float | None = None  # logits = softcap * tanh(scale * q @ k / softcap) + bias


class Grads(NamedTuple):
    """Gradients of one block; dbias is None when there is no bias."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


class Kernel(ABC):
    """Walks over pieces; a subclass gives the arithmetic of a single one."""

    name: str

    @abstractmethod
    def piece_forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, band: Band, options: Options) -> Partial:
        """Attention within one rectangle. Every row sees at least one key, unless its bias is -inf."""

    @abstractmethod
    def piece_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor,
        band: Band,
        options: Options,
    ) -> Grads:
        """This rectangle's share of the gradients."""

    def refine(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """The pieces as this kernel wants them; it may cut some up."""
        return pieces

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pieces: Sequence[Piece], options: Options
    ) -> Partial:
        pieces = self.refine(pieces)
        if _is_whole(pieces, q, k):
            return self.piece_forward(q, k, v, bias, pieces[0].band, options)
        # Rows that occur in one piece only are copied as they are; sums need the accumulation dtype.
        once = _rows_occur_once(pieces)
        total = nothing(q.shape[:-1], v.shape[-1], q.dtype if once else accum_dtype(q.dtype), q.device)
        for piece in pieces:
            rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            part = self.piece_forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], _cut(bias, keys), piece.band, options)
            into = Partial(total.out[:, :, rows], total.lse[:, :, rows])
            if once:
                into.out.copy_(part.out)
                into.lse.copy_(part.lse)
            else:
                merge_(into, part)
        return total

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor,
        pieces: Sequence[Piece],
        options: Options,
    ) -> Grads:
        pieces = self.refine(pieces)
        if _is_whole(pieces, q, k):
            return self.piece_backward(q, k, v, bias, dout, lse, delta, pieces[0].band, options)
        dtype = q.dtype if len(pieces) == 1 else accum_dtype(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        total = Grads(dq, dk, dv, _zeros_like(bias))
        for piece in pieces:
            rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
            part = self.piece_backward(
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                _cut(bias, keys),
                dout[:, :, rows],
                lse[:, :, rows],
                delta[:, :, rows],
                piece.band,
                options,
            )
            total.dq[:, :, rows] += part.dq
            total.dk[:, :, keys] += part.dk
            total.dv[:, :, keys] += part.dv
            if total.dbias is not None and part.dbias is not None:
                total.dbias[:, :, keys] += part.dbias
        return total


def _rows_occur_once(pieces: Sequence[Piece]) -> bool:
    runs = sorted((piece.q_start, piece.q_stop) for piece in pieces)
    return all(stop <= start for (_, stop), (start, _) in pairwise(runs))


def _is_whole(pieces: Sequence[Piece], q: Tensor, k: Tensor) -> bool:
    return len(pieces) == 1 and (pieces[0].rows, pieces[0].keys) == (q.shape[2], k.shape[2])


def _cut(bias: Tensor | None, keys: slice) -> Tensor | None:
    return None if bias is None else bias[:, :, keys]


def _zeros_like(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.zeros_like(bias)
